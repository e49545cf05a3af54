# %% [markdown]
# # Train PythonLM on Colab or Kaggle
#
# Installs the project into an environment of its own, trains in a subprocess that stops and saves before the session
# ends, resumes, evaluates and plots. This notebook itself never imports JAX: only one process can hold the TPU, and
# that is the one that trains.
#
# Choose a TPU as the accelerator, look at the settings, run all cells. In the next session run all cells again: the
# training goes on where it stopped. Without a TPU the notebook shows itself with a tiny model; the outputs below are of
# such a run on a CPU. This file is made by `notebooks/build.py`.

# %%
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

from IPython.display import Image, display

started = time.monotonic()
ON_COLAB = "COLAB_RELEASE_TAG" in os.environ
ON_KAGGLE = "KAGGLE_KERNEL_RUN_TYPE" in os.environ

# %% [markdown]
# ## Settings

# %%
REPOSITORY = ""  # the git address of this project; not needed where the notebook lies in a checkout of it
CONFIG = "configs/validate_10m.yml"  # what to train
RUN_NAME = "validate_10m"  # the same name resumes the run
OVERRIDES = []  # any key=value of configs/base.yml, for example "steps=1000"
DATA = ""  # a folder of prepared token blocks with train/ and heldout/; empty: the Python files of this machine
PREVIOUS = ""  # Kaggle: the output of an earlier session, such as /kaggle/input/my-run/outputs, to go on from
HOURS = 8.5 if ON_KAGGLE else 11.5  # when to stop; a Kaggle session ends after 9 hours, one of Colab after 12 or 24
FIRST_HOURS = 0.05  # a first short piece, to see it stop and resume before it is trusted with the rest

if ON_COLAB:
    OUTPUT = "/content/drive/MyDrive/pythonlm"  # what lies elsewhere is lost with the session
elif ON_KAGGLE:
    OUTPUT = "/kaggle/working/outputs"
else:
    OUTPUT = os.environ.get("M_BASE_OUTPUT_DIRECTORY", "outputs")
    FIRST_HOURS = 3 / 3600
    OVERRIDES = ["base_emb_dim=64", "base_num_decoder_layers=2", "base_mlp_dim=128", "head_dim=16", "vocab_size=2048"]
    OVERRIDES += ["max_target_length=64", "embedded_corpus_bytes=4000000", "steps=1500", "log_period=250"]
    OVERRIDES += ["eval_interval=500", "learning_rate_schedule_steps=1500", "enable_tensorboard=false"]

# %% [markdown]
# ## Install
#
# `setup.sh` makes `.venv` with the pinned versions. It does not touch the JAX of this notebook.

# %%
places = [pathlib.Path.cwd(), *pathlib.Path.cwd().parents, pathlib.Path.cwd() / "pythonlm"]
root = next((place for place in places if (place / "MaxText/train.py").is_file()), None)
if root is None:
    if not REPOSITORY:
        raise ValueError(
            "this notebook does not lie in the project: set REPOSITORY, above, to the project's git address"
        )
    subprocess.run(["git", "clone", REPOSITORY, "pythonlm"], check=True)
    root = pathlib.Path("pythonlm").resolve()
python = root / ".venv/bin/python"
if not python.exists():
    device = ["--device", "tpu"] if ON_COLAB or ON_KAGGLE else []
    subprocess.run(["bash", "setup.sh", *device], cwd=root, check=True)
print("ready")

# %% [markdown]
# ## Data, and what earlier sessions left

# %%
if ON_COLAB and any(path.startswith("/content/drive") for path in (OUTPUT, DATA)):
    from google.colab import drive

    drive.mount("/content/drive")
run = pathlib.Path(OUTPUT).resolve() / RUN_NAME
if PREVIOUS and not run.exists():
    shutil.copytree(pathlib.Path(PREVIOUS) / RUN_NAME, run)
data = ["dataset_type=embedded"]
if DATA:
    data = ["dataset_type=grain", f"grain_train_files={DATA}/train", f"grain_eval_files={DATA}/heldout"]

# %% [markdown]
# ## Train
#
# `train(hours)` shows what the training prints, and asks it to stop when its time is over or this cell is interrupted.
# It then saves, and exits with code 75; code 0 means that all steps are done.


# %%
def train(hours):
    """Trains for that long, counted from the first step; the exit code."""
    command = [python, "MaxText/train.py", CONFIG, f"run_name={RUN_NAME}", f"base_output_directory={run.parent}"]
    environment = {name: value for name, value in os.environ.items() if name != "TPU_PROCESS_ADDRESSES"}  # Kaggle's
    # A session of its own, so that interrupting this cell does not reach it as a second signal, which would not save.
    with subprocess.Popen(
        [*command, *data, *OVERRIDES],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        stop = threading.Timer(hours * 3600, process.send_signal, [signal.SIGTERM])
        kill = threading.Timer(hours * 3600 + 600, process.kill)  # one that hangs has 10 minutes to save
        try:
            for line in process.stdout:
                print(line, end="")
                if line.startswith("completed step: ") and not stop.ident:
                    stop.start()
                    kill.start()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)
            print(process.stdout.read(), end="")
            raise  # so that "run all" does not go on to resume
        finally:
            stop.cancel()
            kill.cancel()
    return process.returncode


code = train(FIRST_HOURS)
print(f"exit code {code}:", {0: "all steps are done", 75: "stopped, can be resumed"}.get(code, "failed"))

# %% [markdown]
# ## Resume
#
# The same command again goes on after the last step, with the same data as if it had never stopped.

# %%
if code == 75:
    code = train(HOURS - (time.monotonic() - started) / 3600)
if code == 75:
    print("The time of this session is over: run all cells in the next one.")
elif code != 0:
    raise RuntimeError(f"training failed with exit code {code}: the last lines above say why")

# %% [markdown]
# ## Evaluate
#
# Every `eval_interval` steps the training measures its loss on held-out files. Bits per byte can be compared between
# tokenizers; the loss per token cannot.

# %%
records = [json.loads(line) for line in (run / "metrics/metrics.jsonl").read_text().splitlines()]
print(f"{'step':>8} {'held-out loss':>14} {'perplexity':>11} {'bits per byte':>14}")
for record in records:
    if "eval/avg_loss" in record:
        values = [record[f"eval/{name}"] for name in ("avg_loss", "avg_perplexity", "bits_per_byte")]
        print(f"{record['step']:>8,} {values[0]:>14.3f} {values[1]:>11.2f} {values[2]:>14.3f}")

# %% [markdown]
# ## Plot

# %%
plot = [sys.executable, root / "benchmarks/plot_metrics.py", run, "--output", run / "loss.png"]
subprocess.run(plot, check=True, stdout=subprocess.DEVNULL)
display(Image(run / "loss.png"))
