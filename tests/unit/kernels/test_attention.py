"""The attention entry point against a loop over positions in float64; differential attention, the difference of two."""

import json
import runpy
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxText import models, sharding, train_report, train_state
from MaxText.kernels import attention, attention_cudnn, attention_flash, differential, flash, flash_blocks, splash
from tests import support


def by_hand(query, key, value, segment_ids):
    batch, length, heads, dim = query.shape
    group = heads // key.shape[2]
    out = np.zeros((batch, length, heads, value.shape[-1]))
    for b in range(batch):
        for t in range(length):
            seen = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
            for n in range(heads):
                scores = key[b, seen, n // group].astype(np.float64) @ query[b, t, n] / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ value[b, seen, n // group]
    return out


SMALL_BLOCKS = {  # so that a few positions make several blocks
    "test": {"forward": (flash.Blocks(256, 128, 128), 1), "backward": (flash.Blocks(128, 128, 128), 1)},
    "test, larger": {"forward": (flash.Blocks(256, 256, 128), 1), "backward": (flash.Blocks(256, 128, 256), 1)},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for chip, blocks in SMALL_BLOCKS.items():
        for dtype in ("float32", "bfloat16"):
            for maps, head_dim, width in ((1, 64, 64), (1, 64, 128), (1, 128, 128), (2, 64, 128)):
                monkeypatch.setitem(flash_blocks.TABLE, (chip, dtype, maps, head_dim, width), {1: blocks})


AXES = {"batch_axes": sharding.BATCH_AXES, "head_axis": sharding.HEAD_AXIS}


def serve(name, query, key, value, segment_ids):
    """The implementation of that name; a TPU kernel is interpreted, cuDNN has a twin where it cannot serve."""
    if name == "splash":
        options = {"soft_cap": None, "block": 128, "has_fused_backward": False, "interpret": True}
        return splash.attention_splash(query, key, value, segment_ids, **AXES, **options)
    if name == "flash":
        return attention_flash.attention_flash(query, key, value, segment_ids, **AXES, chip="test", interpret=True)
    if name == "cudnn":
        twin = "cudnn" if jax.default_backend() == "gpu" and query.dtype == jnp.bfloat16 else "xla"
        return attention_cudnn.attention_cudnn(query, key, value, segment_ids, **AXES, implementation=twin)
    return attention.attention(query, key, value, segment_ids, implementation=name, **AXES)


def example(length, num_kv_heads, dtype, head_dim, value_dim):
    rng = np.random.default_rng(length)
    query = jnp.asarray(rng.normal(size=(2, length, 4, head_dim)), dtype)
    key = jnp.asarray(rng.normal(size=(2, length, num_kv_heads, head_dim)), dtype)
    value = jnp.asarray(rng.normal(size=(2, length, num_kv_heads, value_dim)), dtype)
    return query, key, value, jnp.asarray(np.sort(rng.integers(0, 3, (2, length))), jnp.int32)


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_matches_a_loop_over_positions(implementation, num_kv_heads, width):
    *qkv, segment_ids = example(7, num_kv_heads, jnp.float32, 8, width)
    with jax.set_mesh(support.mesh_of()):
        got = jax.jit(serve, static_argnums=0)(implementation, *qkv, segment_ids)
    np.testing.assert_allclose(got, by_hand(*map(np.asarray, (*qkv, segment_ids))), atol=1e-5)


@pytest.mark.parametrize("implementation", ["dot_product", "blocked"])
def test_differential_attention_is_the_difference_of_two_maps(implementation):
    query, key, value, segment_ids = example(7, 2, jnp.float32, 8, 16)
    other_query, other_key = query[::-1], key[::-1]
    pair = (jnp.stack([query, other_query], 2), jnp.stack([key, other_key], 2))
    weight = jnp.full(query.shape[:3], 0.3)
    got = differential.differential_attention(*pair, value, weight, segment_ids, implementation=implementation, **AXES)
    one, other = (
        by_hand(*map(np.asarray, (q, k, value, segment_ids))) for q, k in ((query, key), (other_query, other_key))
    )
    np.testing.assert_allclose(got, one - 0.3 * other, atol=1e-5)


def test_bfloat16_in_bfloat16_out():
    x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    assert serve("autoselected", x, x, x, jnp.ones((1, 4), jnp.int32)).dtype == jnp.bfloat16


def test_what_cannot_serve_is_refused_with_all_reasons():
    with pytest.raises(ValueError, match="attention='fast' is none of"):
        attention.chosen("fast", "tpu", 64, "bfloat16")
    with pytest.raises(ValueError, match=r"on TPUs, and the mesh's devices are cpu devices; .*head_dim is 40"):
        attention.chosen("splash", "cpu", 40, "bfloat16")
    with pytest.raises(ValueError, match=r"on NVIDIA GPUs, .* are tpu devices; .*head_dim is 256; .*dtype is float32"):
        attention.chosen("cudnn", "tpu", 256, "float32")


@pytest.mark.parametrize(
    ("platform", "capability", "head_dim", "dtype", "name"),
    [
        ("tpu", None, 64, "float32", "flash"),
        ("tpu", None, 40, "bfloat16", "blocked"),
        ("gpu", "9.0", 40, "bfloat16", "cudnn"),
        ("gpu", "7.5", 64, "bfloat16", "blocked"),
        ("gpu", "gfx942", 64, "bfloat16", "blocked"),
        ("gpu", "9.0", 64, "float32", "blocked"),
        ("gpu", "9.0", 60, "bfloat16", "blocked"),
        ("cpu", None, 64, "bfloat16", "blocked"),
    ],
)
def test_a_chip_gets_its_kernel_where_it_serves(platform, capability, head_dim, dtype, name, monkeypatch):
    device = types.SimpleNamespace(**({"compute_capability": capability} if capability else {}))
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert attention.chosen("autoselected", platform, head_dim, dtype) == name


@pytest.mark.parametrize(("num_kv_heads", "width"), [(1, 64), (2, 128)])
def test_cudnn_takes_our_shapes_in_both_passes(num_kv_heads, width, monkeypatch):
    """JAX's own checks, and what it would send to a GPU. That the kernels compute the same, a GPU has to show."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    *qkv, segment_ids = example(7, num_kv_heads, jnp.bfloat16, 64, width)

    def loss(*qkv):
        return jnp.sum(attention_cudnn.attention_cudnn(*qkv, segment_ids, **AXES).astype(jnp.float32))

    with jax.set_mesh(support.mesh_of()):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*qkv).lower(lowering_platforms=("cuda",))
    for call in ("fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"):
        calls = [line for line in lowered.as_text().splitlines() if f"@__cudnn${call}(" in line]
        assert len(calls) == width // 64
        assert all(r"\22mask_type\22: \22CAUSAL\22" in line for line in calls)


@pytest.mark.parametrize(
    ("kind", "shape", "longest"),
    [("TPU v5 lite", (1, 1, 128, 128), 24576), ("TPU v6 lite", (2, 2, 128, 256), 8192)],
)
def test_rows_too_long_for_flash_get_splash_and_a_line(kind, shape, longest, monkeypatch, caplog):
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "chip", lambda: kind)
    attention._flash_serves.cache_clear()
    for length, name in ((longest, "flash"), (2 * longest, "splash"), (2 * longest, "splash")):
        assert attention.serving("autoselected", (length, *shape), "bfloat16") == name
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(
        f"attention=autoselected takes splash: attention=flash cannot serve max_target_length={2 * longest}"
    )
    assert attention.serving("flash", (2 * longest, *shape), "bfloat16") == "flash"  # which then refuses in words


def check_against_reference(implementation, query, key, value, segment_ids, dtype, mesh):
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(*query.shape[:3], value.shape[3])), jnp.float32)

    def value_and_gradients(name):
        def loss(*qkv):
            out = serve(name, *qkv, segment_ids)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        with jax.set_mesh(mesh):
            return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(query, key, value)

    (_, want), want_gradients = value_and_gradients("dot_product")
    (_, got), gradients = value_and_gradients(implementation)
    tolerance = 1e-5 if dtype == jnp.float32 else 6e-2
    for ours, theirs in zip((got, *gradients), (want, *want_gradients), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(theirs.astype(jnp.float32)))))
        np.testing.assert_allclose(ours.astype(jnp.float32) / scale, theirs.astype(jnp.float32) / scale, atol=tolerance)


@pytest.mark.parametrize("length", [1, 3, 8, 17])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [8, 16])
def test_blocked_matches_the_reference(length, num_kv_heads, dtype, width):
    check_against_reference("blocked", *example(length, num_kv_heads, dtype, 8, width), dtype, support.mesh_of())


def test_blocked_makes_its_exponentials_again_only_where_its_residuals_are_not_kept():
    *qkv, segment_ids = example(8, 1, jnp.float32, 8, 8)

    def exponentials(policy):
        served = jax.checkpoint(lambda *qkv: serve("blocked", *qkv, segment_ids), policy=policy)
        return str(jax.make_jaxpr(jax.grad(lambda *qkv: jnp.sum(served(*qkv)), (0, 1, 2)))(*qkv)).count("= exp ")

    policies = jax.checkpoint_policies
    with jax.set_mesh(support.mesh_of()):
        assert exponentials(policies.save_only_these_names("context")) == 4  # of two blocks, forward and backward
        assert exponentials(policies.nothing_saveable) == 6


@pytest.mark.parametrize(
    ("attention_type", "longest"), [("standard", 16384), ("differential", 8192), ("differential_v2", 16384)]
)
def test_the_first_lines_of_a_run_name_what_serves(attention_type, longest, monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "chip", lambda: "TPU v6 lite")
    mesh = support.mesh_of()
    keys = {"attention_type": attention_type, "base_num_kv_heads": 2, "head_dim": 128, "dtype": "bfloat16"}
    for length, name in ((longest, "flash"), (2 * longest, "splash")):
        config = support.small_config(**keys, max_target_length=length)
        state = train_state.abstract_train_state(config, models.abstract(config), mesh)
        assert f"Attention: {name} (attention=autoselected)" in train_report.opening(config, mesh, state, 1)


@pytest.mark.parametrize("implementation", ["flash", "splash", "cudnn"])
@pytest.mark.parametrize(("num_kv_heads", "head_dim", "value_dim"), [(1, 64, 64), (2, 64, 128), (4, 128, 128)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_match_the_reference(implementation, num_kv_heads, head_dim, value_dim, dtype):
    arrays = example(199, num_kv_heads, dtype, head_dim, value_dim)
    check_against_reference(implementation, *arrays, dtype, support.mesh_of())


@pytest.mark.parametrize("implementation", ["flash", "splash", "cudnn"])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_kernels_with_heads_split_over_devices(implementation, num_kv_heads):
    arrays = example(130, num_kv_heads, jnp.float32, 64, 64)
    check_against_reference(implementation, *arrays, jnp.float32, support.mesh_of(2, 1, 4))


@pytest.mark.parametrize(
    ("chip", "length", "num_kv_heads", "num_keys", "dtype", "packed", "mesh"),
    [
        ("test", 384, 2, 2, jnp.float32, True, (1, 1, 1)),
        ("test, larger", 512, 2, 1, jnp.float32, True, (1, 1, 1)),
        ("test", 301, 1, 2, jnp.float32, True, (2, 1, 4)),
        ("test", 301, 4, 2, jnp.float32, True, (2, 1, 4)),
        ("test", 1, 4, 1, jnp.float32, False, (1, 1, 1)),
        ("test, larger", 512, 2, 2, jnp.bfloat16, False, (1, 1, 1)),
        ("unknown", 130, 1, 1, jnp.bfloat16, True, (1, 1, 1)),
    ],
)
def test_differential_flash_matches_two_references(chip, length, num_kv_heads, num_keys, dtype, packed, mesh):
    rng = np.random.default_rng(length)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    arrays = (normal(2, length, 2, 4, 64), normal(2, length, num_keys, num_kv_heads, 64))
    arrays += (normal(2, length, num_kv_heads, 128), jnp.asarray(rng.random((2, length, 4)), jnp.float32))
    segment_ids = np.sort(rng.integers(0, 3, (2, length))) if packed else np.ones((2, length))
    segment_ids = jnp.asarray(segment_ids, jnp.int32)
    direction = jnp.asarray(rng.normal(size=(2, length, 4, 128)), jnp.float32)

    def fused(*arrays):
        return attention_flash.differential_flash(*arrays, segment_ids, **AXES, chip=chip, interpret=True)

    def two_maps(*arrays):
        options = {"implementation": "dot_product", **AXES}
        return differential.differential_attention(*arrays, segment_ids, **options)

    def value_and_gradients(attend):
        def loss(*arrays):
            out = attend(*arrays)
            return jnp.sum(out.astype(jnp.float32) * direction), out

        with jax.set_mesh(support.mesh_of(*mesh)):
            (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays)
        return out, *gradients

    for ours, theirs in zip(value_and_gradients(fused), value_and_gradients(two_maps), strict=True):
        ours, theirs = (x.astype(jnp.float32) / max(1.0, float(jnp.max(jnp.abs(theirs)))) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=1e-5 if dtype == jnp.float32 else 2e-2)


def test_too_long_for_vmem_is_refused_in_words():
    with pytest.raises(ValueError, match=r"flash cannot serve max_target_length=100000: .* need \d+ MiB .*=splash"):
        flash_blocks.plan("TPU v6 lite", 100_000, 2, 2, 128, 256, "bfloat16", True)


@pytest.mark.parametrize("length", [1, 128, 300, 512, 640, 1536, 2048, 8192])
def test_blocks_divide_the_padded_length(length):
    plan = flash_blocks.plan("TPU v6 lite", length, 2, 2, 128, 256, "bfloat16", True)
    for blocks in (plan.forward, plan.backward):
        assert not blocks.query % blocks.key and not blocks.query % blocks.diagonal and not blocks.diagonal % 128
        assert -length % blocks.query <= max(length // 8, 127)
    longest, other = sorted((plan.forward.query, plan.backward.query), reverse=True)
    assert not longest % other


@pytest.mark.parametrize(
    "row", json.loads(flash_blocks.PATH.read_text()), ids=lambda row: " ".join(map(str, row.values()))
)
def test_the_table_stays_within_the_vmem_that_is_asked_for(row):
    """What the compiler used for these blocks, beside the bound that the kernels are given."""
    for which in ("forward", "backward"):
        blocks = flash.Blocks(*row[which]["blocks"])
        shape = (row["length"], row["maps"], row["keys"], row["head_dim"], row["width"], 2)
        assert row[which]["vmem"] <= flash_blocks.vmem_bytes(blocks, *shape) <= 100 * 2**20


def test_every_row_of_the_table_can_be_measured_again(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    source = runpy.run_path(str(support.ROOT / "benchmarks" / "flash_blocks.py"))
    for row in json.loads(flash_blocks.PATH.read_text()):
        for which in ("forward", "backward"):
            assert tuple(row[which]["blocks"]) in source["CANDIDATES"][row["length"]], row
