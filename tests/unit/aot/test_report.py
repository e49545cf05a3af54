"""The report on a step: what it says where memory does not suffice; the compiler itself is not run."""

import json

import jax
import pytest

from MaxText.aot import compile as aot_compile
from MaxText.aot import hlo, report, sweep, topologies
from MaxText.job import lower, make_job
from tests import support

ERROR = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.13G of 15.48G hbm. Exceeded by 4.65G.

Program hbm requirement 20.13G:
    HLO temp         20.13G (100.0% utilization)

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_type="dot" op_name="jit(step)/dot" source_file="{root}/MaxText/loss.py" source_line=22
     Shape: f32[16384,131072]{{1,0:T(8,128)}}
     Unpadded size: 8.00G
     ==========================

  2. Size: 1.5M
     Operator: op_name="jit(step)/mul"
     Shape: bf16[786432]{{0}}
     ==========================
"""


def refusing(job, monkeypatch, message):
    def refuse(_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    return lower(job)


@pytest.fixture(scope="module")
def job():
    return make_job(support.small_config(ici_fsdp_parallelism=2), jax.devices()[:2])


def test_a_step_that_does_not_fit_is_reported_with_its_state_its_largest_arrays_and_what_to_do(job, monkeypatch):
    error = ERROR.format(root=report.ROOT)
    compiled, found = aot_compile._compiled(job, refusing(job, monkeypatch, error), topologies.parse("v5e-1"))
    assert compiled is None
    memory = json.loads(json.dumps(found))["memory"]
    assert not memory["fits"]
    assert memory["parameters"] == memory["gradients"] > 0
    assert memory["optimizer"] >= 2 * memory["parameters"]
    assert memory["largest"] == [
        {"bytes": 8 * 2**30, "array": "f32[16384,131072]", "source": "MaxText/loss.py:22"},
        {"bytes": 3 * 2**19, "array": "bf16[786432]", "source": "jit(step)/mul"},
    ]
    words = "\n".join(report.describe(found))
    for part in (
        "DOES NOT FIT: RESOURCE_EXHAUSTED",
        "20.13G of 15.48G",
        "16.00 GiB",
        "To need less: remat_policy=full",
    ):
        assert part in words
    assert not sweep.fits(found)
    assert "does not fit: RESOURCE_EXHAUSTED" in sweep.table([({"remat_policy": "none"}, found)])[1]


def test_another_refusal_is_the_compilers_own(job, monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        aot_compile._compiled(job, refusing(job, monkeypatch, "INTERNAL: no such option"), topologies.parse("v5e-1"))


def test_every_float32_array_as_large_as_the_vocabulary_is_counted():
    def line(name, shape):
        return f'  %{name} = {shape}{{1,0}} copy(%p), metadata={{op_name="{name}"}}'

    lines = [line(f"copy.{number}", "f32[1000,8]") for number in range(11)]
    lines += [line("half", "bf16[1000,8]"), line("logits", "f32[16,1024]"), line("small", "f32[999,8]")]
    text = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n" + "\n".join(lines) + "\n}\n"
    arrays = report.arrays_in_hbm(hlo.parse(text))
    assert report.vocabulary_float32(arrays, 1000) == {"f32[1000,8]": 11, "f32[16,1024]": 1}
