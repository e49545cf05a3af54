"""launch/: the Slurm script, run by an srun that starts processes here, and what the GKE manifest must say."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import yaml

from MaxText.launchers import tpus
from tests import support

SLURM = support.ROOT / "launch/slurm.sh"
# Starts SLURM_NTASKS processes with Slurm's variables, passes signals on, exits with their highest code, as srun does.
SRUN = """
import os, pathlib, signal, subprocess, sys
flags = [word for word in sys.argv[1:3]]
assert flags == ["--label", "--wait=300"], flags
pathlib.Path(os.environ["LOG"]).open("a").write(repr(sys.argv[3:]) + "\\n")
count = int(os.environ["SLURM_NTASKS"])
tasks = [subprocess.Popen(sys.argv[3:], env={**os.environ, "SLURM_PROCID": str(index)}) for index in range(count)]
def forward(number, _):
    for task in tasks:
        task.send_signal(number)
signal.signal(signal.SIGTERM, forward)
pathlib.Path(os.environ["PID"]).write_text(str(os.getpid()))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
TRAINER = """
import os, pathlib, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
state = pathlib.Path(sys.argv[1] + os.environ["SLURM_PROCID"])
step = int(state.read_text()) if state.exists() else 0
while step < int(sys.argv[2]) and not stop:
    time.sleep(0.02)
    step += 1
    state.write_text(str(step))
sys.exit(0 if step >= int(sys.argv[2]) else 75)
"""


@pytest.fixture
def slurm(tmp_path, user_environment):
    """(command words, restarts so far) -> a job script under way; what it called is in tmp_path/log."""
    programs = {
        "srun": SRUN,
        "scontrol": "import os, sys; open(os.environ['LOG'], 'a').write(repr(sys.argv[1:]) + '\\n')",
    }
    (tmp_path / "bin").mkdir()
    for name, program in programs.items():
        (tmp_path / f"{name}.py").write_text(program)
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / name}.py "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train.py").write_text(TRAINER)
    variables = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "4"}
    files = {"LOG": str(tmp_path / "log"), "PID": str(tmp_path / "pid")}
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def start(words: list[str], restarts: int = 0) -> subprocess.Popen:
        environment = user_environment | variables | files | {"PATH": path, "SLURM_RESTART_COUNT": str(restarts)}
        return subprocess.Popen(["bash", str(SLURM), *words], env=environment, stdout=subprocess.PIPE, text=True)

    return start


def states(tmp_path: pathlib.Path) -> list[int]:
    return [int(path.read_text() or 0) for path in sorted(tmp_path.glob("state*"))]


def test_slurm_queues_an_interrupted_run_again_and_it_goes_on(slurm, tmp_path):
    command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path / "state"), "60"]
    process = slurm(command)
    deadline = time.monotonic() + 30
    while len(states(tmp_path)) < 4 or min(states(tmp_path)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)  # as --signal does before the time limit
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 75
    assert "interrupted and saved: queued again" in output
    assert (tmp_path / "log").read_text().splitlines() == [repr(command), "['requeue', '7']"]
    assert max(states(tmp_path)) < 60
    again = slurm(command, restarts=1)
    assert "start 1 of job 7 on 4 node(s)" in again.communicate(timeout=30)[0]
    assert again.returncode == 0
    assert states(tmp_path) == [60] * 4


def test_slurm_queues_a_run_again_of_which_one_process_was_killed_and_the_others_aborted(slurm, tmp_path):
    process = slurm(["sh", "-c", "if [ $SLURM_PROCID = 2 ]; then kill -KILL $$; else kill -ABRT $$; fi"])
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 137
    assert "ended by signal 9: queued again" in output
    assert (tmp_path / "log").read_text().splitlines()[1:] == ["['requeue', '7']"]


@pytest.mark.parametrize("code", [1, 2, 76, 128])
def test_slurm_does_not_queue_a_failure_again(slurm, tmp_path, code):
    process = slurm(["sh", "-c", f"exit {code}"])
    assert "queued" not in process.communicate(timeout=30)[0]
    assert process.returncode == code
    assert "requeue" not in (tmp_path / "log").read_text()


def test_slurm_passes_words_as_they_are_and_failures_on(slurm, tmp_path):
    hostile = ["$(touch PWNED)", "two  words", "-n", 'it\'s "so"', "new\nline", "*"]
    process = slurm(
        [sys.executable, "-c", "import sys; sys.exit(3 if sys.argv[1:] == " + repr(hostile) + " else 4)", *hostile]
    )
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert "requeue" not in (tmp_path / "log").read_text()


def test_slurm_does_not_queue_for_ever_and_needs_a_command(slurm, tmp_path):
    for code in (75, 137):
        process = slurm(["sh", "-c", f"exit {code}"], restarts=100)
        output = process.communicate(timeout=30)[0]
        assert process.returncode == code
        assert "for the 101st time: not queued again" in output
        assert "requeue" not in (tmp_path / "log").read_text()
    process = slurm([])
    process.communicate(timeout=30)
    assert process.returncode == 2


def test_the_gke_manifest_restarts_what_is_interrupted_and_ends_what_fails():
    manifest = yaml.safe_load((support.ROOT / "launch/gke_jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]

    wanted = tpus.find("v6e-16")
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == wanted.topology
    assert job["parallelism"] == job["completions"] == wanted.workers
    assert container["resources"]["limits"]["google.com/tpu"] * wanted.workers == wanted.chips

    # A worker that fails for good fails its Job by the pod failure policy, which alone fails the JobSet; all else is
    # counted, and as no retry is allowed to the Job itself, the JobSet starts all slices again.
    assert (job["backoffLimit"], job["completionMode"], pod["restartPolicy"]) == (0, "Indexed", "Never")
    disrupted, failed = job["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert failed["action"] == "FailJob"
    assert failed["onExitCodes"]["containerName"] == container["name"]
    assert failed["onExitCodes"]["operator"] == "NotIn"
    assert {75, 137, 143} <= set(failed["onExitCodes"]["values"])
    assert not {0, 1, 2} & set(failed["onExitCodes"]["values"])
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] >= 31  # the resumes of a 1.08B run on a notebook's quota
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]


def test_the_gke_manifest_runs_the_command_of_the_other_launchers():
    text = (support.ROOT / "launch/gke_jobset.yaml").read_text()
    (slices,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
    command = slices["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:3] == [".venv/bin/python", "MaxText/train.py", "configs/validate_10m.yml"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    explain = [sys.executable, *command[1:], "--explain", "base_output_directory"]
    done = subprocess.run(explain, cwd=support.ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "/bucket/runs" in done.stdout
    assert json.dumps(command).count("/bucket/") == 1


def test_the_gke_manifest_mounts_a_bucket_in_which_directories_can_be_renamed():
    text = (support.ROOT / "launch/gke_jobset.yaml").read_text()
    (slices,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
    (volume,) = slices["template"]["spec"]["template"]["spec"]["volumes"]
    options = volume["csi"]["volumeAttributes"]["mountOptions"].split(",")
    (limit,) = (option.removeprefix("rename-dir-limit=") for option in options if "rename" in option)
    assert int(limit) >= 100_000  # files of a checkpoint: a few for each of some thousand processes
