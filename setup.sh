#!/usr/bin/env bash
# Makes .venv with exactly the packages of the lock files. Safe to run again: what is in place already is left alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly UV_VERSION=0.13.8      # installs a lock in seconds; without it pip does the same in minutes
readonly TORCH_VERSION=2.13.0   # the tests compare with it; setup chooses its build, so no lock holds it
readonly TORCH_FOLDER=.venv/torch

usage() {
  cat <<'TEXT'
usage: bash setup.sh [options]
  --python PATH     the Python to make .venv from: 3.11, 3.12 or 3.13 (default: the .venv there is, else the first found)
  --device DEVICE   cpu, tpu or cuda (default: what this machine has)
  --data            also what prepare_data.py and dataset_type=hf read: Parquet, the Hugging Face hub, .zst, TFDS
  --test            also what the tests and checks need, --data among it; PyTorch too where a CPU-only build of it is on offer
  --torch           also PyTorch for the tests, whichever build is on offer (for Linux usually the CUDA one, several GB)
  --tpu-compiler    also the TPU compiler, which compiles for a TPU on a machine that has none
  -h, --help        this text
TEXT
}

say() { echo "setup: $*"; }
die() { echo "setup: error: $*" >&2; exit 1; }

main() {
  local python="" device="" data=false test=false torch=no tpu_compiler=false
  while (($#)); do
    case $1 in
      --python) python=${2:-}; shift ;;
      --device) device=${2:-none}; shift ;;
      --data) data=true ;;
      --test) test=true ;;
      --torch) torch=yes ;;
      --tpu-compiler) tpu_compiler=true ;;
      -h | --help) usage; return ;;
      *) usage >&2; die "unknown option: $1" ;;
    esac
    shift || die "the last option needs a value"
  done
  if [[ -z $device ]]; then
    device=$(find_device)
    say "device: $device, by what this machine has (--device chooses another)"
  fi
  [[ $device =~ ^(cpu|tpu|cuda)$ ]] || die "--device $device: must be cpu, tpu or cuda"
  [[ $device != cuda ]] || check_driver

  make_venv "$python"
  install runtime requirements.lock
  if [[ $device == cuda ]]; then install cuda requirements-cuda.lock; fi
  if [[ $device == tpu || $tpu_compiler == true ]]; then install tpu requirements-tpu.lock; fi
  if [[ $data == true || $test == true ]]; then install data requirements-data.lock; fi
  if [[ $test == true ]]; then install test requirements-test.lock; fi
  if [[ $test == true && $torch == no ]]; then torch=cpu-only; fi
  if [[ $torch != no ]]; then install_torch "$torch"; fi

  if [[ $changed == true ]]; then
    # Shows that the installation works.
    local probe='import jax, flax.nnx, optax, grain; print("setup: JAX", jax.__version__, "sees", jax.devices())'
    if [[ $device == cpu ]]; then export JAX_PLATFORMS=cpu; fi   # else the TPU compiler would look for its TPU
    .venv/bin/python -c "$probe" ||
      die "the installation does not work; remove .venv and run this again"
  fi
  say "ready in $SECONDS s; next: .venv/bin/python MaxText/train.py configs/validate_10m.yml steps=100"
}

changed=false   # whether this run installed anything

find_device() {
  # PCI ids of Google's TPUs, v3 to v7x; the vendor id alone would match the network cards of Google's CPU machines too.
  local pci tpus=" 0x0027 0x0056 0x005e 0x0062 0x0063 0x006f 0x0076 "
  for pci in /sys/bus/pci/devices/*; do
    [[ -r $pci/vendor && $(<"$pci/vendor") == 0x1ae0 && $tpus == *" $(<"$pci/device") "* ]] && { echo tpu; return; }
  done
  if compgen -G '/dev/accel[0-9]*' >/dev/null && [[ -n ${TPU_ACCELERATOR_TYPE:-} ]]; then echo tpu
  elif [[ -e /dev/nvidia0 || -e /dev/dxg ]] && nvidia-smi -L >/dev/null 2>&1; then echo cuda
  else echo cpu
  fi
}

check_driver() {
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || return 0
  [[ ! $driver =~ ^([0-9]+)\. ]] || ((BASH_REMATCH[1] >= 580)) ||
    die "CUDA 13 needs NVIDIA driver 580 or newer and this one is $driver: update it, or use --device cpu"
}

# Prints "3.12" if $1 is a Python we support, else nothing.
supported_version() {
  "$1" -c 'import sys; v = sys.version_info[:2]; print("%d.%d" % v if (3, 11) <= v <= (3, 13) else "")' 2>/dev/null || true
}

make_venv() {
  local python=$1 version candidate old=""
  if [[ -x .venv/bin/python ]]; then old=$(supported_version .venv/bin/python); fi
  if [[ -n $old && (-z $python || $old == "$(supported_version "$python")") ]]; then
    say ".venv: there, Python $old"
  else
    if [[ -z $python ]]; then
      for candidate in python3 python3.13 python3.12 python3.11; do
        if [[ -n $(supported_version "$candidate") ]]; then python=$candidate; break; fi
      done
    fi
    [[ -n $python ]] ||
      die "no Python 3.11, 3.12 or 3.13 found (python3: $(python3 -V 2>&1 | head -n 1)); install one or use --python PATH"
    version=$(supported_version "$python")
    [[ -n $version ]] || die "--python $python is not Python 3.11, 3.12 or 3.13 but: $("$python" -V 2>&1 | head -n 1)"
    say ".venv: making it with Python $version"
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      "$python" -m venv --clear .venv || die "could not make .venv with $python"
    else   # as on Colab and on a bare Debian or Ubuntu
      "$python" -m venv --clear --without-pip .venv 2>/dev/null &&
        "$python" -m pip --quiet --python .venv/bin/python install pip ||
        die "$python has no venv module; on Debian and Ubuntu: sudo apt-get install python$version-venv"
    fi
  fi
  .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null ||
    die ".venv has no pip; remove it and run this again"
  mkdir -p .venv/installed
}

# install NAME LOCK: the packages of LOCK, unless .venv/installed/NAME says that they are there.
install() {
  local name=$1 lock=$2 start=$SECONDS how=uv
  if cmp -s "$lock" ".venv/installed/$name"; then say "$name packages: there"; return; fi
  say "$name packages: installing $lock"
  if ! with_uv "$lock"; then
    how=pip
    .venv/bin/python -m pip install --quiet --no-deps --requirement "$lock" 2>.venv/installed/error ||
      die "could not install $lock. Is there a network, or a proxy that pip must be told of? pip says:
$(grep ERROR .venv/installed/error | tail -n 3)"
  fi
  cp "$lock" ".venv/installed/$name"
  changed=true
  say "$name packages: installed with $how in $((SECONDS - start)) s"
}

with_uv() {
  .venv/bin/uv --version 2>/dev/null | grep -q "^uv $UV_VERSION" ||
    .venv/bin/python -m pip install --quiet --retries 1 "uv==$UV_VERSION" >/dev/null 2>&1 ||
    { say "uv $UV_VERSION cannot be had; using pip, which takes minutes"; return 1; }
  # Bytecode, as pip makes it: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each launch would compile
  # the packages anew, which is 2.0 of the 4.4 processor seconds of a short one.
  .venv/bin/uv pip install --quiet --no-deps --compile-bytecode --python .venv/bin/python --requirement "$1" \
    2>.venv/installed/error ||
    { say "uv failed ($(head -n 1 .venv/installed/error)); using pip, which takes minutes"; return 1; }
}

# Prints the version pip would install, such as 2.13.0+cpu.
offered_torch() {
  .venv/bin/python -m pip install --quiet --dry-run --ignore-installed --no-deps --report - "torch==$TORCH_VERSION" 2>/dev/null |
    .venv/bin/python -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' 2>/dev/null
}

# install_torch yes|cpu-only: PyTorch by pip, because only pip's own settings say where a CPU-only build is. It gets a
# folder of its own, which the tests put on their path: transformers imports any PyTorch it finds, which takes seconds.
install_torch() {
  local start=$SECONDS build="" left_out=.venv/installed/torch_left_out there=.venv/installed/torch words=(--target "$TORCH_FOLDER")
  if [[ $(cat "$there" 2>/dev/null) == "$TORCH_VERSION" ]]; then
    say "torch: there"
    return
  fi
  if [[ $1 == cpu-only ]]; then
    [[ -e $left_out ]] || build=$(offered_torch) || build=""
    if [[ $build != *+cpu && $(uname -s) != Darwin ]]; then
      touch "$left_out"
      say "torch: left out, no CPU-only build of $TORCH_VERSION on offer; tests that need it are skipped (see --torch)"
      return
    fi
    words+=(--no-deps)  # what this build needs is in the locks
  fi
  say "torch: installing $TORCH_VERSION"
  rm -rf "$TORCH_FOLDER"
  .venv/bin/python -m pip install --quiet --no-compile "${words[@]}" "torch==$TORCH_VERSION" 2>.venv/installed/error ||
    die "could not install torch $TORCH_VERSION; pip says:
$(grep ERROR .venv/installed/error | tail -n 3)"
  echo "$TORCH_VERSION" >"$there"
  say "torch: installed in $((SECONDS - start)) s"
}

main "$@"
