"""The launchers as a user runs them, against a gcloud that keeps its cloud in a folder: four workers are four groups of
real processes. What they run stands for training: it counts steps in a shared directory, and ends with 75 when stopped.
"""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest

from MaxText.launchers import job, runner, tpus
from tests import support
from tests.integration import fake_gcloud
from tests.processes import group

RUNNER = [sys.executable, str(support.ROOT / "MaxText/multihost_runner.py")]
JOB = [sys.executable, str(support.ROOT / "MaxText/multihost_job.py")]
# A training command, as far as a launcher can tell one: `train.py SHARED STEPS`.
TRAINER = """
import os, pathlib, signal, sys, time
shared, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
me = os.environ.get("JAX_PROCESS_ID", "0")
state = shared / f"state_{me}"
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
step = int(state.read_text()) if state.exists() else 0
(shared / f"starts_{me}").open("a").write(f"{step}\\n")
while step < steps and not stop:
    time.sleep(0.02)
    step += 1
    print("completed step:", step, flush=True)
    (shared / f"new_{me}").write_text(str(step))
    (shared / f"new_{me}").rename(state)
sys.exit(0 if step >= steps else 75)
"""
HOSTILE = {
    "spaces": "two  words ",
    "quotes": """it's "so" `called`""",
    "commands": "$(touch PWNED); touch PWNED & | > PWNED",
    "newline": "one\ntwo\n",
    "leading dashes": "--rf -x",
    "not ascii": "größe-模型",
    "backslashes": "a\\b\\\\c\\n%s!!",
}


class World:
    """A fake cloud, a tree to send, a directory that all workers share, and a user's shell."""

    def __init__(self, folder: pathlib.Path, environment: dict[str, str]):
        self.shared, self.tree, self.shell = folder / "shared", folder / "tree", folder / "shell"
        for path in (self.shared, self.tree, self.shell, folder / "cloud/buckets/a-bucket", folder / "bin"):
            path.mkdir(parents=True)
        self.cloud = fake_gcloud.Cloud(folder / "cloud")
        self.metadata = fake_gcloud.MetadataServer(self.cloud)
        (self.tree / "train.py").write_text(TRAINER)
        (folder / "bin/gcloud").write_text(f'#!/bin/sh\nexec {sys.executable} {fake_gcloud.__file__} "$@"\n')
        (folder / "bin/gcloud").chmod(0o755)
        (folder / "bin/python3").symlink_to(sys.executable)  # without its packages: the agent must not need any
        self.environment = environment | {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            fake_gcloud.CLOUD: str(self.cloud.folder),
            fake_gcloud.METADATA: self.metadata.address,
        }

    def train(self, steps: int) -> str:
        """The command that trains."""
        return f"python3 train.py {shlex.quote(str(self.shared))} {steps}"

    def runner(self, **flags: object) -> list[str]:
        defaults = {"TPU_PREFIX": "tpu", "SCRIPT_DIR": self.tree, "SETUP": "", "PREFLIGHT": False, "RUN_NAME": "run"}
        return [*RUNNER, *(f"--{name}={value}" for name, value in (defaults | flags).items())]

    def job(self, **flags: object) -> list[str]:
        defaults = {"TPU_TYPE": "v5e-16", "RUN_NAME": "a-job", "BUCKET_NAME": "a-bucket"}
        same = {"SCRIPT_DIR": self.tree, "SETUP": "", "PREFLIGHT": False}
        return [*JOB, *(f"--{name}={value}" for name, value in (defaults | same | flags).items())]

    def start(self, argv: list[str]) -> subprocess.Popen:
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(argv, cwd=self.shell, env=self.environment, text=True, **both)

    def run(self, argv: list[str]) -> subprocess.CompletedProcess:
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(argv, cwd=self.shell, env=self.environment, text=True, timeout=120, **both)

    def states(self) -> list[int]:
        """The steps that the workers have done."""
        return [int(path.read_text()) for path in sorted(self.shared.glob("state_*"))]

    def starts(self) -> list[int]:
        """How often each worker was started."""
        return [len(path.read_text().split()) for path in sorted(self.shared.glob("starts_*"))]

    def until(self, condition, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"states {self.states()}, starts {self.starts()}"
            time.sleep(0.02)

    def calls(self, *words: str) -> list[list[str]]:
        """The recorded commands that have these words, the launcher's first."""
        return [call for call in self.cloud.calls() + self.cloud.calls("machines") if set(words) <= set(call)]


@pytest.fixture
def world(tmp_path, user_environment):
    made = World(tmp_path, user_environment)
    yield made
    for pid in made.cloud.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    made.metadata.shutdown()
    made.metadata.server_close()


@pytest.fixture
def four(world):
    """The world with a TPU of four workers."""
    world.cloud.add_node("tpu", "v5litepod-16")
    return world


@pytest.fixture
def in_process(monkeypatch):
    """Runs a launcher inside the test, which may then change its constants; the exit code."""

    def call(world: World, module, argv: list[str]) -> int:
        for name, value in world.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(world.shell)
        return module.main(argv[2:])

    return call


def test_four_workers_are_sent_the_tree_and_run_the_command(four):
    subprocess.run(["git", "init", "-q", four.tree], check=True)
    (four.tree / ".gitignore").write_text("junk/\n*.log\n")
    for name in ("junk/big.bin", "old.log", "src/new.py"):
        (four.tree / name).parent.mkdir(exist_ok=True)
        (four.tree / name).write_text("x")
    done = four.run(four.runner(COMMAND=four.train(3), SETUP="echo ready > setup_was_here"))
    assert done.returncode == 0, done.stdout
    assert four.states() == [3, 3, 3, 3]
    for index in range(4):
        home = four.cloud.home("tpu", index) / "run"
        sent = {
            str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and ".launch" not in path.parts
        }
        assert sent == {"train.py", ".gitignore", "src/new.py", "setup_was_here"}
        assert f"[0.{index}] completed step: 3" in done.stdout
        log = (four.shell / f"outputs/launches/run/output_slice_0000_worker_{index:04d}.txt").read_text()
        assert log.splitlines()[-3:] == [f"completed step: {step}" for step in (1, 2, 3)]
    copies = four.calls("scp")
    assert len(copies) == 4
    assert "--worker=0" in copies[0], "one connection first, to make the ssh key"


def test_two_launches_of_one_second_are_two(world, in_process, monkeypatch):
    world.cloud.add_node("tpu", "v6e-8")
    monkeypatch.setattr(runner.time, "time", lambda: 0.0)
    assert [in_process(world, runner, world.runner(COMMAND="true")) for _ in range(2)] == [0, 0]


def test_slices_count_on_across_the_nodes(world):
    for number in (1, 0):
        world.cloud.add_node(f"tpu-{number}", "v5litepod-16")
    world.cloud.add_node("tpu-of-another", "v6e-8")
    done = world.run(world.runner(COMMAND="true"))
    assert done.returncode == 0, done.stdout
    assert "2 slice(s) of v5litepod-16, 8 worker(s)" in done.stdout
    nodes = [call[call.index("ssh") + 1] for call in world.calls("ssh")]
    assert sorted(set(nodes)) == ["tpu-0", "tpu-1"]


def test_the_first_failure_stops_the_others_which_save(four):
    wait = f"until [ $(cat {four.shared}/state_0) -gt 2 ]; do sleep 0.05; done; echo some words; exit 3"
    command = f'if [ "$JAX_PROCESS_ID" = 2 ]; then {wait}; fi; {four.train(100000)}'
    done = four.run(four.runner(COMMAND=command))
    assert done.returncode == 3, done.stdout
    assert "run: worker 0.2 (tpu) ended first, with exit code 3" in done.stdout
    assert "  | some words" in done.stdout
    assert len(four.states()) == 3
    assert four.cloud.processes() == []
    assert 2 < max(four.states()) < 100000


def test_ctrl_c_saves_everywhere_and_the_same_command_goes_on(four):
    process = four.start(four.runner(COMMAND=four.train(100000)))
    four.until(lambda: len(four.states()) == 4 and min(four.states()) > 2)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "the same command goes on" in output
    assert four.cloud.processes() == []
    stopped = max(four.states())
    done = four.run(four.runner(COMMAND=four.train(stopped + 5)))
    assert done.returncode == 0, done.stdout
    assert four.states() == [stopped + 5] * 4
    assert four.starts() == [2, 2, 2, 2]


def test_a_launcher_that_is_killed_leaves_no_orphans(four):
    """The end that is left has nobody who reads its output, and must save all the same."""
    process = four.start(four.runner(COMMAND=four.train(100000)))
    four.until(lambda: len(four.states()) == 4 and min(four.states()) > 2)
    process.kill()
    process.communicate()
    four.until(lambda: four.cloud.processes() == [])
    log = four.cloud.home("tpu", 1) / "run/.launch/run.log"
    assert log.read_text().splitlines()[-1] == f"completed step: {four.states()[1]}"


def test_a_lost_connection_does_not_run_the_command_twice(four):
    process = four.start(four.runner(COMMAND=four.train(100000)))
    four.until(lambda: len(four.states()) == 4 and min(four.states()) > 2)
    (four.cloud.home("tpu", 3) / "drop").touch()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 76, output
    assert "[0.3] launcher: error: the connection to this worker was lost" in output
    assert four.starts() == [1, 1, 1, 1]
    four.until(lambda: four.cloud.processes() == [])


def test_a_command_that_ends_as_ssh_does_is_not_run_again(four):
    done = four.run(four.runner(COMMAND="exit 255"))
    assert done.returncode == 254
    assert "Retrying" not in done.stdout


def test_the_holder_of_a_busy_tpu_is_named_and_stopped_if_asked(four, in_process, monkeypatch, capfd, tmp_path):
    device = tmp_path / "accel0"
    device.touch()
    hold = f"import signal, sys, time; f = open({str(device)!r}); print(1, flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    holder.stdout.readline()
    monkeypatch.setattr(tpus, "DEVICE_FILES", (str(tmp_path / "accel*"),))
    monkeypatch.setattr(tpus, "LOCK_FILE", str(tmp_path / "libtpu_lockfile"))
    (tmp_path / "libtpu_lockfile").touch()
    with holder, contextlib.ExitStack() as at_end:
        at_end.callback(holder.kill)  # a failure below must not wait for it
        refused = in_process(four, runner, four.runner(COMMAND="true"))
        output = capfd.readouterr().out
        assert refused == 1
        assert f"the TPU is held by pid {holder.pid} ({sys.executable} -c import signal" in output
        assert re.search(r"running 0:0\d:\d\d", output)
        assert holder.poll() is None
        assert in_process(four, runner, four.runner(COMMAND="true", STOP_HOLDER=True)) == 0
        assert holder.wait(10) == -signal.SIGTERM
    assert f"pid {holder.pid} has ended" in capfd.readouterr().out
    assert not (tmp_path / "libtpu_lockfile").exists()


@pytest.mark.slow
def test_preflight_asks_jax_on_all_workers_connected(four):
    """Four processes of four CPU devices are what JAX sees as a v5e-16."""
    four.environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "JAX_COORDINATOR_ADDRESS": _free_address()}
    flags = {"PREFLIGHT": True, "PYTHON": sys.executable, "MIN_FREE_GB": 0, "BUCKET_NAME": "a-bucket"}
    done = four.run(four.runner(**flags))
    assert done.returncode == 0, done.stdout
    assert re.search(r"preflight: 4 worker\(s\), 16 x cpu, jax [\d.]+; clocks within \d", done.stdout)
    written = sorted(call[4] for call in four.calls("storage", "cp"))
    assert written == [f"gs://a-bucket/run/preflight/slice_0000_worker_{index:04d}" for index in range(4)]
    assert sorted(call[3] for call in four.calls("storage", "rm")) == written


def test_preflight_tells_all_problems_at_once_and_nothing_runs(four):
    (four.cloud.folder / "buckets/a-bucket").rmdir()
    flags = {"PREFLIGHT": True, "PYTHON": "no/such/python", "MIN_FREE_GB": 1e18, "BUCKET_NAME": "a-bucket"}
    done = four.run(four.runner(COMMAND=f"{four.train(1)} base_output_directory=/proc/runs", **flags))
    assert done.returncode == 2
    if pathlib.Path("/proc").is_mount():  # where nobody can make a directory
        assert len(re.findall(r"worker 0\.\d \(.*\): cannot rename a directory below /proc: ", done.stdout)) == 4
    for index in range(4):
        for words in (
            "JAX does not start: no/such/python",
            "GB of disk are free, fewer than --MIN_FREE_GB=1e+18",
            "does not exist",
        ):
            assert re.search(rf"worker 0\.{index} \(.*\): .*{re.escape(words)}", done.stdout), words
    assert four.states() == []


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_arrive_as_they_are(world, tmp_path, name):
    """In the tree, its own folder, the folder of the run, the log directory, the command, and the setup."""
    world.cloud.add_node("tpu", "v6e-1")
    word = HOSTILE[name]
    tree = tmp_path / f"tree {word}".replace("/", "")
    tree.mkdir()
    (tree / word).write_text(f"contents of {word}")
    flags = {
        "SCRIPT_DIR": tree,
        "RUN_NAME": word,
        "LOG_DIR": tmp_path / f"logs {word}",
        "SETUP": f"printf %s {shlex.quote(word)} > from_setup",
        "COMMAND": f"cat -- {shlex.quote(word)} && printf %s {shlex.quote(word)} > from_command",
    }
    done = world.run(world.runner(**flags))
    assert done.returncode == 0, done.stdout
    home = world.cloud.home("tpu", 0) / word
    assert (home / word).read_text() == f"contents of {word}"
    assert (home / "from_setup").read_text() == (home / "from_command").read_text() == word
    assert "contents of" in (tmp_path / f"logs {word}/output_slice_0000_worker_0000.txt").read_text()
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize("name", sorted(set(HOSTILE) - {"newline"}))
def test_hostile_names_arrive_in_a_job(world, tmp_path, name, in_process, monkeypatch):
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    word = HOSTILE[name]
    (world.tree / word).write_text(word)
    write = f"cat -- {shlex.quote(word)} > {shlex.quote(str(world.shared / word))}"
    argv = world.job(TPU_TYPE="v6e-8", COMMAND=write, BUCKET_DIR=word, LOG_DIR=tmp_path / word)
    assert in_process(world, job, argv) == 0
    assert (world.shared / word).read_text() == word
    assert (world.cloud.folder / f"buckets/a-bucket/{word}/a-job/attempts/0001/exits").is_dir()
    assert not list(tmp_path.rglob("PWNED"))


def test_a_job_runs_on_slices_of_its_own_and_gives_them_back(world, in_process, monkeypatch, capfd):
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    assert in_process(world, job, world.job(COMMAND=world.train(3), SETUP="echo made ready", NUM_SLICES=2)) == 0
    assert world.states() == [3] * 8
    with world.cloud.state() as state:
        assert state == {"nodes": {}, "queued": {}}
    attempt = world.cloud.folder / "buckets/a-bucket/a-job/attempts/0001"
    logs = sorted((attempt / "logs").iterdir())
    assert [path.name for path in logs] == [f"slice_{s:04d}_worker_{w:04d}.txt" for s in (0, 1) for w in range(4)]
    for log in logs:
        lines = log.read_text().splitlines()
        assert lines[:2] == ["made ready", "completed step: 1"]
        assert re.fullmatch(r"launcher: worker [01]\.[0-3] ends with exit code 0", lines[-1])
    assert "complete; the logs are in gs://a-bucket/a-job/attempts/0001/logs/" in capfd.readouterr().out


def test_a_job_survives_a_preemption(world, in_process, monkeypatch, capfd):
    """The machines get SIGTERM and are gone, disks and all; new ones go on where those had saved."""
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    preempted_at = []

    def sleep(seconds: float) -> None:  # what the launcher does between two looks at the cloud
        time.sleep(seconds)
        if not preempted_at and len(world.states()) == 4 and min(world.states()) > 2:
            world.cloud.preempt("a-job", grace_seconds=20)
            preempted_at.extend(world.states())

    monkeypatch.setattr(job, "time", types.SimpleNamespace(sleep=sleep, strftime=time.strftime))
    assert in_process(world, job, world.job(COMMAND=world.train(200), CQR_EXTRA_ARGS="--spot")) == 0
    assert world.states() == [200] * 4
    assert all(2 < step < 200 for step in preempted_at)
    starts = [(world.shared / f"starts_{index}").read_text().split() for index in range(4)]
    assert starts == [["0", str(step)] for step in preempted_at], "each went on from what it had saved"
    assert len(world.calls("create", "--spot")) == 2
    attempts = world.cloud.folder / "buckets/a-bucket/a-job/attempts"
    first = [json.loads(path.read_text()) for path in sorted((attempts / "0001/exits").iterdir())]
    assert first == [{"worker": f"0.{index}", "code": 75, "final": False} for index in range(4)]
    assert "attempt 2: asking for 1 x v5litepod-16" in capfd.readouterr().out


@pytest.mark.slow
def test_the_real_trainer_survives_a_preemption_of_its_four_workers(world, in_process, monkeypatch, tmp_path):
    """The losses of two attempts on four workers are those of one process that nobody interrupts."""
    keys = {"steps": 400, "learning_rate_schedule_steps": 400, "eval_interval": -1, "ici_data_parallelism": 4}
    alone = group.train(tmp_path / "alone", 1, 4, **keys)
    assert alone.codes() == [0], alone.output(0)
    one_device = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_COORDINATOR_ADDRESS": _free_address()}
    world.environment |= one_device
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    metrics = world.shared / "run/metrics/metrics.jsonl"
    preempted = []

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        if not preempted and metrics.exists() and len(metrics.read_text().splitlines()) > 5:
            world.cloud.preempt("a-job", grace_seconds=60)
            preempted.append(True)

    monkeypatch.setattr(job, "time", types.SimpleNamespace(sleep=sleep, strftime=time.strftime))
    command = shlex.join([sys.executable, *group.words(base_output_directory=world.shared, **keys)])
    assert in_process(world, job, world.job(SCRIPT_DIR=support.ROOT, COMMAND=command)) == 0
    attempts = world.cloud.folder / "buckets/a-bucket/a-job/attempts"
    logs = [(attempts / f"000{number}/logs/slice_0000_worker_0000.txt").read_text() for number in (1, 2)]
    stopped = re.search(r"Stopped after step (\d+) of 400; the same command resumes", logs[0])
    assert stopped, logs[0]
    assert f"Resuming after step {stopped[1]} " in logs[1]
    assert "Device count: 4 (cpu, 4 process(es))" in logs[1]
    found, expected = (group.losses(folder / "run") for folder in (world.shared, tmp_path / "alone"))
    assert found.keys() == expected.keys() and len(expected) > 10
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-6)


def test_a_job_that_is_interrupted_on_a_machine_that_stays_starts_again_there(world, in_process, monkeypatch):
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    once = (
        f"if mkdir {world.shared}/once_$JAX_PROCESS_ID 2>/dev/null; then timeout 0.5 {world.train(100000)}; exit 75; fi"
    )
    assert in_process(world, job, world.job(COMMAND=f"{once}; {world.train(60)}")) == 0
    assert world.states() == [60] * 4
    assert world.starts() == [2] * 4
    assert len(world.calls("create")) == 1


def test_a_job_that_fails_is_not_started_again(world, in_process, monkeypatch, capfd):
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    command = f'echo x >> {world.shared}/runs; if [ "$JAX_PROCESS_ID" = 1 ]; then exit 7; fi; sleep 60'
    assert in_process(world, job, world.job(COMMAND=command)) == 7
    assert (world.shared / "runs").read_text() == "x\n" * 4
    assert "worker 0.1 failed with exit code 7" in capfd.readouterr().out
    assert world.cloud.processes() == []
    with world.cloud.state() as state:
        assert state["queued"] == {}
    assert in_process(world, job, world.job(COMMAND=world.train(2))) == 0, "mended, it starts again"
    assert world.states() == [2] * 4


def test_a_job_goes_on_without_the_launcher_and_the_same_command_watches_again(world, in_process, monkeypatch):
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    assert in_process(world, job, world.job(COMMAND=world.train(50), WATCH=False)) == 0
    assert in_process(world, job, world.job(COMMAND=world.train(50))) == 0
    assert world.states() == [50] * 4
    assert world.starts() == [1] * 4
    assert len(world.calls("create")) == 1
    assert in_process(world, job, world.job(COMMAND=world.train(50))) == 0, "complete: nothing is asked for"
    assert len(world.calls("create")) == 1


def test_a_job_nobody_watches_gives_its_slices_back_by_itself(world, in_process, monkeypatch):
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    assert in_process(world, job, world.job(COMMAND=world.train(3), WATCH=False)) == 0
    world.until(lambda: world.calls("delete") and world.cloud.processes() == [])
    with world.cloud.state() as state:
        assert state == {"nodes": {}, "queued": {}}


@pytest.mark.parametrize("odd_version", ["0.10.2", "0.10.1"])
def test_a_job_compares_its_workers_before_it_runs(world, in_process, monkeypatch, tmp_path, odd_version):
    """What stands for the Python with JAX writes what that would; worker 2 may have another version."""
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    answer = {"devices": 16, "local_devices": 4, "kind": "TPU v5 lite", "versions": {"jax": "0.10.2"}}
    (tmp_path / "answer").write_text(json.dumps(answer))
    odd = f's/"jax": "0.10.2"/"jax": "{odd_version}"/'
    script = (
        f"""#!/bin/sh\nif [ "$JAX_PROCESS_ID" = 2 ]; then edit='{odd}'; fi\nsed "$edit" {tmp_path}/answer > "$3"\n"""
    )
    (tmp_path / "python").write_text(script)
    (tmp_path / "python").chmod(0o755)
    flags = {"PREFLIGHT": True, "PYTHON": tmp_path / "python", "MIN_FREE_GB": 0}
    equal = odd_version == "0.10.2"
    assert in_process(world, job, world.job(COMMAND=world.train(1), **flags)) == (0 if equal else 1)
    assert world.states() == ([1] * 4 if equal else [])
    words = "16 x TPU v5 lite, jax 0.10.2" if equal else "jax differs: 0.10.1 on 0.2; 0.10.2 on 0.0, 0.1, 0.3"
    logs = [path.read_text() for path in world.cloud.folder.rglob("logs/*.txt")]
    assert any(words in log for log in logs)


def test_where_there_is_systemd_the_agent_is_a_service_that_is_told_of_a_shutdown(tmp_path):
    script = job.startup_script("a-job", "agent.pyz", "tree.tar.gz", "gs://a-bucket/it's; $(touch PWNED)")
    script = script.replace("/run/systemd/system", str(tmp_path)).replace("sleep 10", "exit 9")
    for name, program in {"gcloud": 'touch "$4"', "systemd-run": 'printf "%s\\n" "$@" > words'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    subprocess.run(["bash", "-c", script], env={"HOME": str(tmp_path), "PATH": path}, cwd=tmp_path, check=True)
    words = (tmp_path / "a-job/words").read_text().splitlines()
    assert words[-4:] == ["python3", "agent.pyz", "job", "order.json"]
    wanted = [
        "--unit=a-job",
        "--property=KillMode=mixed",
        f"--working-directory={tmp_path}/a-job",
        f"--setenv=HOME={tmp_path}",
    ]
    assert set(wanted) <= set(words)
    assert f"--setenv=PATH={path}:/snap/bin" in words
    assert sorted(p.name for p in (tmp_path / "a-job").iterdir()) == ["agent.pyz", "order.json", "tree.tar.gz", "words"]


def test_deleting_a_job(world, in_process, monkeypatch):
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    in_process(world, job, world.job(COMMAND=world.train(100000), WATCH=False))
    assert in_process(world, job, [*JOB, "--RUN_NAME=a-job", "--DELETE=true"]) == 0
    assert world.cloud.processes() == []


@pytest.mark.parametrize("kind", ["runner", "job"])
def test_a_dry_run_prints_exactly_what_a_run_does_and_does_nothing(world, in_process, monkeypatch, capfd, kind):
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(time_ns=lambda: 0))
    world.cloud.add_node("tpu", "v6e-8")
    make, module = (world.runner, runner) if kind == "runner" else (world.job, job)
    argv = make(COMMAND=f"echo {shlex.quote(HOSTILE['quotes'])}", SETUP="true")
    assert in_process(world, module, [*argv, "--dry-run"]) == 0
    printed = [shlex.split(line) for line in capfd.readouterr().out.splitlines() if line.startswith("gcloud ")]
    only_read = world.cloud.calls()
    assert all({"list", "get"} & set(call) for call in only_read)
    assert not (world.shell / "outputs").exists()
    assert in_process(world, module, argv) == 0
    done = [call for call in world.cloud.calls()[len(only_read) :] if not {"list", "get", "cat", "ls"} & set(call)]
    assert printed == done
    assert len(printed) >= 3


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("words", "restarts", "warning"),
    [
        ("", 1, "--COMMAND has no base_output_directory"),
        ("base_output_directory=runs", 1, "--COMMAND has base_output_directory=runs, no absolute path"),
        ("base_output_directory='gs://a/b'", 1, "--COMMAND has base_output_directory=gs://a/b, no absolute path"),
        ("base_output_directory=/bucket/runs", 1, ""),
        ('"base_output_directory=$HOME/bucket"', 1, ""),
        ("", 0, ""),
    ],
)
def test_a_job_warns_of_checkpoints_that_a_preemption_takes(
    world, in_process, monkeypatch, capfd, words, restarts, warning, dry_run
):
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    argv = world.job(COMMAND=f"true {words}", TPU_TYPE="v6e-1", MAX_RESTARTS=restarts, WATCH=False)
    assert in_process(world, job, [*argv, *dry_run]) == 0
    found = capfd.readouterr().err
    assert f"warning: {warning}:" in found if warning else "warning" not in found


@pytest.mark.slow
def test_the_real_gcloud_knows_every_command(world, in_process, monkeypatch, capfd):
    """Its own check of a command line, which needs neither an account nor a network."""
    real = shutil.which("gcloud")
    if real is None:
        pytest.skip("there is no gcloud here")
    monkeypatch.setattr(job, "POLL_SECONDS", 0.2)
    world.cloud.add_node("tpu", "v6e-8")
    flags = {"BUCKET_NAME": "a-bucket", "PREFLIGHT": True, "PYTHON": "none", "INTERNAL_IP": True}
    assert in_process(world, runner, world.runner(COMMAND="true", **flags)) == 2
    assert in_process(world, runner, world.runner(COMMAND="echo a b")) == 0
    assert in_process(world, job, world.job(COMMAND="true", CQR_EXTRA_ARGS="--spot", NUM_SLICES=2)) == 0
    assert in_process(world, job, world.job(COMMAND="true", RUN_NAME="other", TPU_TYPE="v6e-8")) == 0
    kinds = {}
    for call in world.calls():
        kinds[tuple(re.split(r"[=/]", word)[0] for word in call if not word.startswith("launch-"))] = call
    home = world.shell / "gcloud"
    environment = os.environ | {"CLOUDSDK_CONFIG": str(home), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    commands = world.shell / "commands.json"
    commands.write_text(json.dumps([{"command_string": shlex.join(call)} for call in kinds.values()]))
    done = subprocess.run(
        [real, "meta", "lint-gcloud-commands", f"--commands-file={commands}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        pytest.skip(f"this gcloud cannot check commands: {done.stderr[-300:]}")
    results = json.loads(done.stdout)
    assert len(results) == len(kinds) >= 9
    assert [(r["command_string"], r["error_message"]) for r in results if not r["success"]] == []


BAD = {
    "no such TPU": ("runner", {"TPU_PREFIX": "gone", "COMMAND": "true"}, "no TPU is named so"),
    "nothing to do": ("runner", {"COMMAND": ""}, "there is nothing to do"),
    "a run name with a path": ("runner", {"COMMAND": "true", "RUN_NAME": "../up"}, "is not a plain name of a folder"),
    "no such tree": ("runner", {"COMMAND": "true", "SCRIPT_DIR": "/no/where"}, "there is no such directory"),
    "neither true nor false": ("runner", {"COMMAND": "true", "PREFLIGHT": "maybe"}, "neither true nor false"),
    "no such slice": ("job", {"COMMAND": "true", "TPU_TYPE": "v6e-9"}, "v5e-N or v6e-N"),
    "a job without a bucket": ("job", {"COMMAND": "true", "BUCKET_NAME": ""}, "needs --COMMAND and --BUCKET_NAME"),
    "a bucket as a URL": ("job", {"COMMAND": "true", "BUCKET_NAME": "gs://b"}, "without gs://"),
    "a bucket directory with a pattern": ("job", {"COMMAND": "true", "BUCKET_DIR": "a*"}, "for patterns"),
    "a job's name that Google refuses": ("job", {"COMMAND": "true", "RUN_NAME": "$(x)"}, "cannot name a TPU"),
    "a job to delete without a name": ("job", {"RUN_NAME": "", "DELETE": True}, "needs --RUN_NAME"),
    "no slice": ("job", {"COMMAND": "true", "NUM_SLICES": 0}, "--NUM_SLICES=0: at least 1"),
    "an unclosed quote": ("job", {"COMMAND": "true", "CQR_EXTRA_ARGS": "--labels='a"}, "No closing quotation"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_in_words(world, name):
    world.cloud.add_node("tpu", "v6e-1")
    kind, flags, message = BAD[name]
    done = world.run(getattr(world, kind)(**flags))
    assert done.returncode == 2, done.stdout
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert not {"ssh", "scp", "create", "cp"} & {word for call in world.calls() for word in call}


def test_without_gcloud_the_launcher_says_so(world):
    (pathlib.Path(world.environment["PATH"].split(os.pathsep)[0]) / "gcloud").unlink()
    world.environment["PATH"] = world.environment["PATH"].split(os.pathsep)[0]
    done = world.run(world.runner(COMMAND="true"))
    assert done.returncode == 2
    assert "there is no gcloud on the PATH" in done.stdout


def _free_address() -> str:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
