"""A compiled step in a file: loaded where it is the run's own step, and in words where it is not."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from MaxText import sharding, train_state
from MaxText.aot import executable
from MaxText.job import lower, make_job
from tests import support


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("executable") / "step"
    job, lowered = of(path)
    # What a CPU loads from JAX's cache of programs cannot be saved again.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    compiled = lowered.compile()
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    assert executable.save(path, job, lowered, compiled) < path.stat().st_size
    return path


def of(path, **keys):
    config = support.small_config(compiled_trainstep_file=path, ici_fsdp_parallelism=2, **keys)
    job = make_job(config, jax.devices()[:2])
    return job, lower(job)


def stepped(job, compiled):
    with jax.set_mesh(job.mesh):
        state = train_state.initial_train_state(job.config, job.abstract_state)
        batch = support.packed_batch(job.config, job.global_batch_size, seed=0)
        state, metrics = compiled(state, jax.device_put(batch, sharding.batch_sharding(job.mesh)))
    return float(metrics["learning/loss"]), jax.tree.map(np.asarray, state.params)


def test_a_loaded_step_is_the_step_that_was_saved(file):
    job, lowered = of(file)
    compiled, lines = executable.load_or_compile(job, lowered)
    assert lines == [f"The step was not compiled but loaded from {file}"]
    loss, params = stepped(job, compiled)
    expected_loss, expected = stepped(job, lowered.compile())
    assert loss == expected_loss
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_another_step_is_compiled_and_what_differs_is_said(file):
    job, lowered = of(file, learning_rate=0.5)
    compiled, (line,) = executable.load_or_compile(job, lowered)
    unused = f"compiled_trainstep_file={file} was not used, and the step was compiled: "
    assert line.startswith(f"{unused}the program of its step: ")
    assert compiled.memory_analysis() is not None


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda whole: whole[:-1], "it is damaged"),
        (lambda whole: b"\x80 no JSON", "it is no file of train_compile.py"),
        (lambda whole: whole.replace(b'"jax ', b'"jax 9.', 1), "the versions of its step: jax 9."),
    ],
)
def test_a_file_that_cannot_be_used_is_not(file, tmp_path, make, why):
    other = tmp_path / "other"
    other.write_bytes(make(file.read_bytes()))
    _, (line,) = executable.load_or_compile(*of(other))
    assert f"the step was compiled: {why}" in line


def test_training_loads_it(file, tmp_path):
    keys = {"compiled_trainstep_file": file, "ici_fsdp_parallelism": 2, "base_output_directory": tmp_path}
    command = [sys.executable, "MaxText/train.py", "configs/base.yml"]
    settings = [f"{key}={value}" for key, value in (support.SMALL | keys).items()]
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(
        [*command, *settings, "jax_cache_dir="], cwd=support.ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"The step was not compiled but loaded from {file}" in done.stdout
