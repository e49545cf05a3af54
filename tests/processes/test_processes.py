"""Several processes that train as one. LONG_TESTS=1 runs all meshes, four processes and two slices as well."""

import os
import pathlib
import re
import signal
import time

import numpy as np
import pytest

from MaxText import checkpoint_manifest, processes
from tests import support
from tests.processes import group

DATA, FSDP = {"ici_data_parallelism": 4}, {"ici_data_parallelism": 1, "ici_fsdp_parallelism": 4}
FSDP_AND_TENSOR = {"ici_data_parallelism": 1, "ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 2}
LONG = pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="minutes; LONG_TESTS=1 runs it")
SLICES = {"ici_data_parallelism": 1, "ici_fsdp_parallelism": -1}  # one process stands for a slice
PROGRAM = support.ROOT / "tests/processes/checkpoint_program.py"


def assert_same_losses(folder: pathlib.Path, expected: dict[tuple[str, int], float]) -> None:
    found = group.losses(folder / "run")
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), atol=1e-6)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The losses of one process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    assert group.train(folder, 1, 4, **FSDP).codes() == [0]
    return group.losses(folder / "run")


def test_two_train_as_one_stop_together_and_one_goes_on_from_their_checkpoint(tmp_path, expected):
    both = group.train(tmp_path, 2, 2, **FSDP_AND_TENSOR)
    both.wait_for(0, "completed step: 3,")
    both.processes[1].send_signal(signal.SIGTERM)  # not to the one that speaks
    assert both.codes() == [75, 75], both.output(0) + both.output(1)
    said = both.output(0)
    assert "Device count: 4 (cpu, 2 process(es))" in said
    assert "another process was asked to stop: stopping after step " in said
    assert "completed step" not in both.output(1)
    stopped = int(re.search(r"Stopped after step (\d+) of 12", said)[1])
    checkpoint_manifest.verify(tmp_path / f"run/checkpoints/{stopped}")
    alone = group.train(tmp_path, 1, 4, **FSDP)
    assert alone.codes() == [0], alone.output(0)
    assert f"Resuming after step {stopped} " in alone.output(0)
    assert_same_losses(tmp_path, expected)


def test_where_one_is_killed_the_other_ends_soon_and_can_be_resumed(tmp_path):
    both = group.train(tmp_path, 2, 2, **FSDP_AND_TENSOR, checkpoint_period=2, steps=10**6)
    both.wait_for(0, "completed step: 5,")
    both.processes[1].kill()
    begin = time.monotonic()
    code = both.processes[0].wait(100)
    print(f"exit code {code} after {time.monotonic() - begin:.1f} s")
    assert time.monotonic() - begin < 70
    assert code in (75, -signal.SIGABRT), both.output(0)  # ours, or JAX's own heartbeat
    if code == 75:
        assert "another process of the run is gone; the same command resumes" in both.output(0)
    whole = checkpoint_manifest.steps_in(tmp_path / "run/checkpoints")
    assert whole and whole[0] >= 2
    both.kill()
    checkpoint_manifest.verify(tmp_path / f"run/checkpoints/{whole[0]}")
    keys = FSDP_AND_TENSOR | {"checkpoint_period": 2, "steps": whole[0] + 2}
    again = group.train(tmp_path, 2, 2, **keys)
    assert again.codes() == [0, 0], again.output(0)
    assert f"Resuming after step {whole[0]} " in again.output(0)


def test_a_checkpoint_of_two_is_read_bit_for_bit_by_one(tmp_path):
    written = group.Group(tmp_path / "write", 2, 2, [PROGRAM, "write", tmp_path, 2, 2])
    assert written.codes() == [0, 0], written.output(0) + written.output(1)
    read = group.Group(tmp_path / "read", 1, 1, [PROGRAM, "read", tmp_path, 1, 1])
    assert read.codes() == [0], read.output(0)
    assert "shards as written" in read.output(0)


@LONG
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("mesh", [DATA, FSDP, FSDP_AND_TENSOR, SLICES], ids=str)
def test_the_losses_are_those_of_one_process(tmp_path, expected, count, mesh):
    if mesh is SLICES:
        mesh = mesh | {"dcn_data_parallelism": count}
    several = group.train(tmp_path, count, 4 // count, **mesh)
    assert several.codes(400) == [0] * count, several.output(0)
    assert_same_losses(tmp_path, expected)


@LONG
def test_a_checkpoint_of_four_is_read_by_four_two_and_one(tmp_path):
    written = group.Group(tmp_path / "write", 4, 1, [PROGRAM, "write", tmp_path, 2, 2])
    assert written.codes(400) == [0] * 4, written.output(0)
    for count, fsdp, tensor in ((4, 4, 1), (2, 1, 2), (1, 1, 1)):
        read = group.Group(tmp_path / f"read{count}", count, 1, [PROGRAM, "read", tmp_path, fsdp, tensor])
        assert read.codes(400) == [0] * count, read.output(0)


def test_who_is_who_by_the_environment():
    address = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "3", "JAX_PROCESS_COUNT": "8"}
    assert processes.find(address) == processes.Processes(3, 8, "a:1")
    alone = processes.Processes(0, 1, "")
    assert processes.find({}) == alone
    assert processes.find({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == alone  # in sbatch, not under srun
    slurm = {"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
    assert processes.find(slurm) == processes.Processes(2, 4, "")
    kaggle = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    assert processes.find(kaggle) == alone
    gke = {"TPU_WORKER_HOSTNAMES": "h0,h1,h2,h3", "TPU_WORKER_ID": "1"}
    assert processes.find(gke) == processes.Processes(1, 4, "")
    slices = gke | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    assert processes.find(slices) == processes.Processes(5, 8, "")
    with pytest.raises(ValueError, match="are not both numbers; set all three, or none"):
        processes.find({"JAX_COORDINATOR_ADDRESS": "a:1"})
