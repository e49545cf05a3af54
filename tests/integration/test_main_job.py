"""The main job as a user runs it, in subprocesses: it learns, resumes bit for bit after kill -9, stops on SIGTERM, and
says what is wrong when something is.
"""

import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from MaxText import run_lock
from tests import support

TRAIN = [sys.executable, str(support.ROOT / "MaxText/train.py")]
# Enough of a model to train for real, small enough for seconds.
TINY = {
    "base_emb_dim": 32,
    "base_num_decoder_layers": 2,
    "base_mlp_dim": 64,
    "head_dim": 8,
    "vocab_size": 256,
    "max_target_length": 32,
    "per_device_batch_size": 4,
    "dataset_type": "synthetic",
    "log_period": 1,
    "eval_interval": 20,
    "eval_steps": 2,
    "enable_tensorboard": "false",
    "learning_rate_schedule_steps": 40,
}
LINE = re.compile(
    r"^completed step: (\d+), seconds: ([\d.]+), TFLOP/s/device: ([\d.]+), Tokens/s/device: ([\d.]+), "
    r"total_weights: (\d+), loss: ([\d.]+)",
    re.MULTILINE,
)


@pytest.fixture
def command(tmp_path, user_environment):
    """(keys -> argv, environment) of a tiny run under tmp_path, compiled programs shared between the tests."""
    environment = user_environment | {"JAX_PLATFORMS": "cpu"}
    cache = support.ROOT / ".pytest_cache/jax_main_job"

    def argv(**keys):
        keys = TINY | {"base_output_directory": tmp_path, "jax_cache_dir": cache, "run_name": "run"} | keys
        return [*TRAIN, str(support.ROOT / "configs/validate_10m.yml"), *(f"{k}={v}" for k, v in keys.items())]

    return argv, environment


def run(command, **keys):
    argv, environment = command
    return subprocess.run(argv(**keys), env=environment, capture_output=True, text=True, timeout=300, cwd="/")


def losses(directory: pathlib.Path) -> dict[int, float]:
    """Step -> training loss; of a step done twice, the last."""
    records = map(json.loads, (directory / "metrics/metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["learning/loss"] for record in records if "learning/loss" in record}


def newest_step(directory: pathlib.Path) -> int:
    return max(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal())


def arrays(step_directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path: parameters, both moments, step."""
    import orbax.checkpoint as ocp
    from jax import tree_util

    path = (step_directory / "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = tree_util.tree_map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {str(path): np.asarray(leaf) for path, leaf in tree_util.tree_leaves_with_path(state)}


def arrays_digest(step_directory: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for path, array in sorted(arrays(step_directory).items()):
        digest.update(path.encode() + array.tobytes())
    return digest.hexdigest()


def test_a_run_prints_what_it_must(command, tmp_path):
    done = run(command, steps=40)
    assert done.returncode == 0, done.stderr
    lines = LINE.findall(done.stdout)
    assert [int(line[0]) for line in lines] == list(range(1, 41))
    assert float(lines[-1][5]) < float(lines[0][5]) - 0.1
    assert float(lines[0][5]) == pytest.approx(np.log(256), abs=0.1)
    for text in (
        "JAX version: ",
        "Device count: 1 (cpu, 1 process(es))",
        "Mesh: data=1 x fsdp=1 x tensor=1",
        "Model parameters: ",
        "Tokens per step: 128",
        "Expected loss at initialization: ln(256) = 5.545",
        "DATA: SYNTHETIC",
        "by the compiler",
        "Completed eval after train step 20, loss=",
        "MFU: ",
        "Trained 40 steps, 5,120 tokens",
        "Final held-out loss: ",
        f"Checkpoint: {tmp_path}/run/checkpoints/40",
    ):
        assert text in done.stdout
    # The first record comes before the machine's speed, which MFU is measured against, is known.
    record = json.loads((tmp_path / "run/metrics/metrics.jsonl").read_text().splitlines()[1])
    assert {"step", "learning/loss", "learning/param_norm", "perf/mfu", "perf/step_time_seconds"} <= set(record)
    assert "git_commit" in json.loads((tmp_path / "run/environment.json").read_text())
    again = run(command, steps=40)
    assert again.returncode == 0
    assert "The run is complete: 40 steps are done" in again.stdout


def test_kill_9_and_resume_is_bit_exact(command, tmp_path):
    keys = {"steps": 40, "checkpoint_period": 5, "dtype": "bfloat16"}
    whole = run(command, run_name="whole", **keys)
    assert whole.returncode == 0, whole.stderr

    argv, environment = command
    rng = np.random.default_rng(0)
    killed_at = []
    for _ in range(3):
        process = subprocess.Popen(argv(run_name="killed", **keys), env=environment, stdout=subprocess.PIPE, text=True)
        stop_after = (killed_at[-1] if killed_at else 0) + int(rng.integers(7, 11))
        for line in process.stdout:
            match = LINE.match(line)
            if match and int(match[1]) >= stop_after:
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        killed_at.append(max(losses(tmp_path / "killed")))
    assert killed_at[-1] < 40
    last = run(command, run_name="killed", **keys)
    assert last.returncode == 0, last.stderr
    assert "Resuming after step " in last.stdout
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    digests = [arrays_digest(tmp_path / name / "checkpoints/40") for name in ("killed", "whole")]
    assert digests[0] == digests[1]


def test_sigterm_saves_and_the_same_command_resumes(command, tmp_path):
    argv, environment = command
    keys = {"steps": 4000, "learning_rate_schedule_steps": 4000, "eval_interval": -1}
    process = subprocess.Popen(argv(**keys), env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("completed step: 3,"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 75
    stopped = int(
        re.search(r"Stopped after step ([\d,]+) of 4,000; the same command resumes", rest)[1].replace(",", "")
    )
    assert (tmp_path / f"run/checkpoints/{stopped}").is_dir()
    done = run(command, **keys | {"steps": stopped + 2})
    assert f"Resuming after step {stopped:,}" in done.stdout
    assert done.returncode == 0, done.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(command, tmp_path):
    assert run(command, steps=20, checkpoint_period=10).returncode == 0
    for path in (tmp_path / "run/checkpoints/20/state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            os.truncate(path, 100)
    done = run(command, steps=30, checkpoint_period=10)
    assert "checkpoint 20 cannot be read, trying an older one" in done.stderr
    assert "Resuming after step 10" in done.stdout
    assert done.returncode == 0, done.stderr
    assert [path.name.split("-")[0] for path in (tmp_path / "run/checkpoints_damaged").iterdir()] == ["20"]


def test_starting_from_another_runs_weights_or_whole_state(command, tmp_path):
    assert run(command, run_name="first", steps=20).returncode == 0
    step = tmp_path / "first/checkpoints/20"
    whole = run(command, run_name="second", steps=22, load_full_state_path=step)
    assert whole.returncode == 0, whole.stderr
    assert LINE.findall(whole.stdout)[0][0] == "21"
    weights = run(command, run_name="third", steps=2, load_parameters_path=step)
    assert weights.returncode == 0, weights.stderr
    first = float(LINE.findall(weights.stdout)[0][5])
    assert LINE.findall(weights.stdout)[0][0] == "1"
    assert first < losses(tmp_path / "first")[1] - 0.05


def test_not_finite_stops_and_is_never_saved(command, tmp_path):
    done = run(command, steps=40, learning_rate=1e20, warmup_steps_fraction=0.05, checkpoint_period=1)
    assert done.returncode == 1
    bad = int(re.search(r"error: step (\d+): param_norm=inf", done.stderr)[1])
    assert bad > 1
    assert newest_step(tmp_path / "run") == bad - 1
    assert all(np.isfinite(array).all() for array in arrays(tmp_path / f"run/checkpoints/{bad - 1}").values())


BAD_INPUTS = {
    "unknown key": ({"per_devise_batch_size": 8}, 2, "did you mean per_device_batch_size"),
    "wrong type": ({"steps": "many"}, 2, "steps"),
    "impossible mesh": ({"ici_fsdp_parallelism": 3, "ici_data_parallelism": 1}, 2, "ici_fsdp_parallelism=3"),
    "more devices than there are": ({"ici_tensor_parallelism": 4}, 2, "device"),
    "missing data": ({"dataset_type": "grain", "grain_train_files": "{tmp}/nowhere"}, 2, "nowhere"),
    "missing checkpoint": ({"load_full_state_path": "{tmp}/gone/3"}, 1, "there is no checkpoint"),
    "a directory that is no checkpoint": ({"load_parameters_path": "{tmp}"}, 1, "is not a checkpoint that can be read"),
    "output directory that cannot be written": ({"base_output_directory": "{tmp}/file"}, 1, "cannot write"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_an_error_in_words(command, tmp_path, name):
    keys, code, message = BAD_INPUTS[name]
    (tmp_path / "file").touch()
    begin = time.monotonic()
    given = {"steps": 2} | {key: str(value).format(tmp=tmp_path) for key, value in keys.items()}
    done = run(command, **given)
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begin < 60


def test_a_checkpoint_of_another_model_or_other_data_is_refused(command, tmp_path):
    assert run(command, steps=2).returncode == 0
    before = arrays_digest(tmp_path / "run/checkpoints/2")
    record = (tmp_path / "run/config.yml").read_text()
    model = run(command, steps=4, base_mlp_dim=96)
    assert model.returncode == 1
    assert "base_mlp_dim: 64 there, 96 here" in model.stderr
    data = run(command, steps=4, data_shuffle_seed=5)
    assert data.returncode == 1
    assert "data_shuffle_seed: 0 there, 5 here" in data.stderr
    assert arrays_digest(tmp_path / "run/checkpoints/2") == before
    assert (tmp_path / "run/config.yml").read_text() == record


def test_the_saved_config_can_be_trained_from(command, tmp_path):
    assert run(command, steps=2).returncode == 0
    argv, environment = command
    again = [*TRAIN, str(tmp_path / "run/config.yml"), "steps=3"]
    done = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "Resuming after step 2" in done.stdout


def test_a_second_launch_is_refused_at_once(command, tmp_path):
    with run_lock.hold(tmp_path / "run"):
        begin = time.monotonic()
        done = run(command, steps=2)
        assert time.monotonic() - begin < 2
    assert done.returncode == 1 and f"is in use by process {os.getpid()} on " in done.stderr


def test_a_profile_is_written_and_a_run_too_short_for_one_is_no_error(command, tmp_path):
    keys = {"profiler": "xplane", "profiler_steps": 2}
    done = run(command, steps=3, skip_first_n_steps_for_profiler=5, **keys)
    assert done.returncode == 0, done.stderr
    done = run(command, steps=8, skip_first_n_steps_for_profiler=1, **keys)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run/tensorboard").rglob("*.xplane.pb"))


def test_a_disk_that_fills_up_keeps_what_was_saved(command, tmp_path):
    """A limit on file size stands for a full disk: the next save fails, loudly, and the last one stays whole."""
    keys = {"steps": 20, "base_emb_dim": 64, "vocab_size": 4096}
    assert run(command, **keys).returncode == 0
    before = arrays_digest(tmp_path / "run/checkpoints/20")
    argv, environment = command
    limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash", *argv(**keys | {"steps": 24, "jax_cache_dir": ""})]
    done = subprocess.run(limited, env=environment, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert "Checkpoints [20] are whole" in done.stderr
    assert arrays_digest(tmp_path / "run/checkpoints/20") == before
    done = run(command, **keys | {"steps": 24})
    assert done.returncode == 0, done.stderr
    assert "Resuming after step 20" in done.stdout


def test_dry_run_says_it_all_and_writes_nothing(command, tmp_path):
    argv, environment = command
    done = subprocess.run([*argv(), "--dry-run"], env=environment, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr
    for text in ("Model parameters: ", "DATA: SYNTHETIC", "by the compiler", "Dry run: nothing was written"):
        assert text in done.stdout
    assert not (tmp_path / "run").exists()
