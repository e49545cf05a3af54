"""The same training whatever the mesh and the accumulation: 20 losses and the gradients, in float32."""

import functools

import jax
import numpy as np
import pytest

from MaxText import job, loss, models, pyconfig, sharding, train_step
from MaxText.layers import dropout
from tests import support

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
STEPS = 20
PYTHONLM = {"attention_type": "differential", "base_num_kv_heads": 4, "logits_via_embedding": False}
PYTHONLM |= {"mtp_num_layers": 2, "mtp_transformer_block": True, "dropout_rate": 0.2, "initializer_range": 0.3}


def config_of(**keys):
    return support.small_config(z_loss_multiplier=1e-3, learning_rate=1e-2, **keys)


@functools.cache
def run(mesh, accumulation, attention="standard 1", opt_type="adamw"):
    """(losses, gradient norms, final parameters) of 20 steps."""
    attention_type, num_kv_heads = attention.split()
    config = config_of(
        gradient_accumulation_steps=accumulation,
        attention_type=attention_type,
        base_num_kv_heads=num_kv_heads,
        opt_type=opt_type,
    )
    trainer = support.Trainer(config, support.mesh_of(*mesh))
    metrics = [trainer(support.packed_batch(config, rows=32, seed=step)) for step in range(STEPS)]
    losses = [m["learning/loss"] for m in metrics]
    return losses, [m["learning/raw_grad_norm"] for m in metrics], jax.device_get(trainer.state.params)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_losses_and_parameters_do_not_depend_on_the_mesh(mesh, accumulation):
    want_losses, want_norms, want_params = run((1, 1, 1), 1)
    losses, norms, params = run(mesh, accumulation)
    assert losses[-1] < losses[0] - 0.05  # it learns, so there is something to differ in
    np.testing.assert_allclose(losses, want_losses, atol=1e-5)
    np.testing.assert_allclose(norms, want_norms, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, want_params)


@pytest.mark.parametrize("attention", ["standard 2", "differential 2", "differential 4", "differential_v2 2"])
def test_heads_split_over_tensor(attention):
    want_losses, want_norms, _ = run((1, 1, 1), 1, attention)
    losses, norms, _ = run((2, 2, 2), 1, attention)
    np.testing.assert_allclose(losses, want_losses, atol=1e-5)
    # The first token of a document sees (1 - lambda) v: near lambda = 1 a differential norm magnifies its rounding.
    np.testing.assert_allclose(norms, want_norms, rtol=1e-3)


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_muon_does_not_depend_on_the_mesh(mesh):
    want_losses, _, want_params = run((1, 1, 1), 1, opt_type="muon")
    losses, _, params = run(mesh, 1, opt_type="muon")
    assert losses[-1] < losses[0] - 0.05
    np.testing.assert_allclose(losses, want_losses, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), params, want_params)


@functools.cache
def initial_params(keys):
    """As NumPy's arrays, so that they are on no device."""
    return jax.device_get(support.initial_params(config_of(**dict(keys))))


@functools.cache
def gradients(mesh, accumulation, keys):
    """The gradients of the first step, each leaf as an array."""
    config = config_of(gradient_accumulation_steps=accumulation, **dict(keys))
    model = models.abstract(config)
    batch = support.packed_batch(config, rows=32, seed=0)
    sums_of = functools.partial(loss.training_sums, config, model, mtp_weight=0.3, head_dtype="float32")
    gradient = jax.grad(sums_of, has_aux=True)

    @jax.jit
    def accumulate(params, batch):
        if config.dropout_rate:
            batch = {**batch, "dropout_keys": dropout.row_keys(0, jax.numpy.array(7), 32)}
        return train_step.accumulate(gradient, params, batch, accumulation)

    with jax.set_mesh(support.mesh_of(*mesh)):
        placed = jax.device_put(batch, sharding.batch_sharding(support.mesh_of(*mesh)))
        total, sums = accumulate(initial_params(keys), placed)
    return jax.tree.map(lambda g: np.asarray(g) / float(sums["total_weights"]), total)


@pytest.mark.parametrize(
    ("mesh", "accumulation", "keys"),
    [
        *((mesh, accumulation, {}) for mesh in MESHES for accumulation in (1, 4)),
        *(
            (mesh, accumulation, PYTHONLM)
            for mesh, accumulation in [((1, 1, 1), 4), ((2, 2, 2), 1), ((1, 8, 1), 4), ((8, 1, 1), 4)]
        ),
    ],
    ids=str,
)
def test_gradients_are_the_same(mesh, accumulation, keys):
    """Every leaf of the first gradient, not only its norm; with all that PythonLM has as well."""

    keys = tuple(keys.items())
    want, got = gradients((1, 1, 1), 1, keys), gradients(mesh, accumulation, keys)
    # Of each leaf by its own size: a lambda's gradient is small.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-4 * np.abs(b).max()), got, want)


def test_one_key_value_head_is_replicated_on_purpose_and_several_are_split():
    mesh = support.mesh_of(1, 2, 4)

    def spec(num_kv_heads):
        model = models.abstract(support.small_config(base_num_kv_heads=num_kv_heads))
        placed = sharding.named_sharding(mesh, model.logical_axes, model.params)
        return placed["decoder"]["layers"]["self_attention"]["key"].spec

    assert spec(1) == jax.sharding.PartitionSpec(None, "fsdp", None, None)
    assert spec(4) == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)
    with pytest.raises(ValueError, match=r"self_attention.key: dimension 'kv_heads' .* has size 2, .*tensor=4"):
        spec(2)


def test_a_pair_of_heads_stays_on_one_device():
    mesh = support.mesh_of(2, 2, 2)
    model = models.abstract(support.small_config(attention_type="differential", base_num_kv_heads=4))
    placed = sharding.named_sharding(mesh, model.logical_axes, model.params)["decoder"]["layers"]["self_attention"]
    assert placed["query"].spec == placed["key"].spec == jax.sharding.PartitionSpec(None, "fsdp", None, "tensor", None)
    with pytest.raises(pyconfig.ConfigError, match="tensor_parallelism=4 does not divide base_num_query_heads / 2=2"):
        support.small_config(attention_type="differential", base_num_kv_heads=4, ici_tensor_parallelism=4)


@pytest.mark.parametrize("path", sorted((support.ROOT / "configs").glob("*.yml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_config_lowers_on_eight_devices(path, mesh):
    sizes = [f"ici_{axis}_parallelism={size}" for axis, size in zip(sharding.MESH_AXES, mesh, strict=True)]
    if "pythonlm" in path.stem and mesh == (1, 2, 4):  # two pairs of key and value heads
        with pytest.raises(pyconfig.ConfigError, match="base_num_kv_heads / 2=2; use 1 or 2"):
            support.shipped_config(path, "sharding_tolerance=1", *sizes)
        return
    config = support.shipped_config(path, "sharding_tolerance=1", *sizes)
    planned, _ = job.make_job(config, jax.devices()).settled(num_windows=None)
    program = job.lower(planned).as_text()
    assert "mhlo.num_partitions = 8" in program


def test_too_many_replicated_weights_are_refused():
    config = support.small_config(sharding_tolerance=0.001)
    with pytest.raises(ValueError, match="would be replicated on every device, more than sharding_tolerance=0.001"):
        support.Trainer(config, support.mesh_of(1, 8, 1))
