"""Compares the trainer with its peers on one shape, interleaved: tokens/s, start to first step, peak memory.

In: --systems, --dtype, --rounds, --steps, the interpreters of peers with an environment of their own (benchmarks/peers/README.md).
Out: one JSON line per run and a summary line per system with the ratios to each peer. Every system is its own process and is
timed from outside, by the arrival of its `completed step` lines: systems that dispatch ahead misstate their own seconds.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
TOKENS_PER_STEP = 8 * 512
DROPPED_STEPS = 2  # the first steps compile and fill caches
COMPLETED = re.compile(r"completed step: (\d+), .*?\bloss: ([\d.]+|nan|inf)")
VERSIONS = "import importlib.metadata as m; print({p: m.version(p) for p in %r})"
MAXTEXT_SETTINGS = """
  dataset_type=synthetic enable_checkpointing=False hardware=cpu attention=dot_product skip_jax_distributed_system=True
  base_emb_dim=256 base_num_query_heads=4 base_num_kv_heads=1 base_mlp_dim=1024 base_num_decoder_layers=6 head_dim=64
  vocab_size=49152 max_target_length=512 logits_via_embedding=True normalize_embedding_logits=False decoder_block=llama2
  per_device_batch_size=8 enable_goodput_recording=False monitor_goodput=False
""".split()


def ours_command(args, dtype, scratch, cache_directory):
  """The trainer's command; its input is the synthetic data unless --ours-args says otherwise."""
  settings = f"""steps={args.steps} dtype={dtype} dataset_type=synthetic run_name=bench base_output_directory={scratch}
    enable_checkpointing=false eval_interval=-1 log_period=1 enable_tensorboard=false jax_cache_dir={cache_directory}"""
  return [args.ours_python, "MaxText/train.py", "configs/validate_10m.yml", *settings.split(), *args.ours_args]


def maxtext_command(args, dtype, scratch):
  """MaxText's pip package with its defaults, at our shape."""
  find = "import importlib.util as u; print(u.find_spec('maxtext').submodule_search_locations[0])"
  package = subprocess.run([args.maxtext_python, "-c", find], capture_output=True, text=True, check=True).stdout.strip()
  run = [f"steps={args.steps}", f"dtype={dtype}", "run_name=bench", f"base_output_directory={scratch}"]
  return [args.maxtext_python, "-m", "maxtext.trainers.pre_train.train", f"{package}/configs/base.yml", *MAXTEXT_SETTINGS, *run]


def build_command(system, args, dtype, scratch):
  """The command line of one system, or None where its interpreter was not given."""
  script = ["--steps", str(args.steps), "--dtype", dtype]
  if system == "ours":  # a cold cache is a directory nobody has used, a warm one that of the first run
    return ours_command(args, dtype, scratch, f"{scratch}/jax_cache")
  if system == "ours_warm":
    return ours_command(args, dtype, scratch, f"{args.warm_directory}/{dtype}")
  if system == "hand_written":
    return [args.ours_python, str(PEERS / "hand_written_jax.py"), *script]
  if system == "maxtext":
    return maxtext_command(args, dtype, scratch) if args.maxtext_python else None
  compiled = ["--compile"] if system == "torch_compile" else []
  return [args.torch_python, str(PEERS / "torch_llama.py"), *script, *compiled] if args.torch_python else None


def run_once(command, timeout_seconds):
  """Runs one process to its end; returns when each step completed, the first and last loss, and what it used."""
  environment = {**os.environ, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
  start = time.perf_counter()
  arrivals, losses, tail = [], [], []
  process = subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
  )
  try:
    for line in process.stdout:
      tail = [*tail[-4:], line.rstrip()]
      if match := COMPLETED.search(line):
        arrivals.append(time.perf_counter() - start)
        losses.append(float(match[2]))
      if time.perf_counter() - start > timeout_seconds:
        process.kill()
        break
  finally:
    if process.poll() is None and sys.exc_info()[0]:
      process.kill()
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode or len(arrivals) <= DROPPED_STEPS + 1:
    return {"error": f"exit code {process.returncode} after {len(arrivals)} steps", "output": tail}
  steps = [later - earlier for earlier, later in zip(arrivals[:-1], arrivals[1:], strict=True)][DROPPED_STEPS - 1 :]
  return {
    "tokens_per_second": TOKENS_PER_STEP / statistics.median(steps),
    "best_tokens_per_second": TOKENS_PER_STEP / min(steps),
    "first_step_seconds": arrivals[0],
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "peak_rss_gb": usage.ru_maxrss / 1e6,
    "losses": [losses[0], losses[-1]],
  }
