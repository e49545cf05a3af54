"""The chunked cross-entropy against its reference twin: values and gradients, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxText import sharding
from MaxText.kernels import cross_entropy
from tests import support


def example(dtype):
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(8, 12, 16)), dtype)
    unembedding = jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 17, (8, 12)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (8, 12)), jnp.float32)
    return hidden, unembedding, targets, weights


def options(z_loss=0.0, soft_cap=0.0, vocab_padding=0):
    axes = {"batch_axes": sharding.BATCH_AXES, "vocab_axis": sharding.VOCAB_AXIS, "embed_axis": sharding.EMBED_AXIS}
    return cross_entropy.Options(z_loss, soft_cap, vocab_padding, num_chunks=3, **axes)


def chunked(hidden, unembedding, targets, weights, options):
    return cross_entropy.cross_entropy(hidden, unembedding, targets, weights, options)


def reference(hidden, unembedding, targets, weights, options):
    table = unembedding.astype(hidden.dtype)
    return cross_entropy.cross_entropy_reference(hidden, table, targets, weights, options)


VARIANTS = {
    "plain": options(),
    "z-loss": options(z_loss=1e-2),
    "soft cap": options(soft_cap=5.0),
    "padding": options(vocab_padding=7),
    "all": options(z_loss=1e-2, soft_cap=5.0, vocab_padding=7),
}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(sizes, variant):
    args, options = example(jnp.float32), VARIANTS[variant]

    def value_and_gradients(function):
        return jax.jit(jax.value_and_grad(lambda h, u: function(h, u, *args[2:], options), (0, 1), has_aux=True))

    (want_loss, want_nll), want = value_and_gradients(reference)(*args[:2])
    with jax.set_mesh(support.mesh_of(*sizes)):
        (loss, nll), got = value_and_gradients(chunked)(*args[:2])
        without_gradients = jax.jit(lambda *a: chunked(*a, options))(*args)
    for ours in ((loss, nll), without_gradients):
        np.testing.assert_allclose(ours[0], want_loss, rtol=1e-6)
        np.testing.assert_allclose(ours[1], want_nll, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bfloat16_accumulates_the_table_gradient_in_float32():
    args = example(jnp.bfloat16)
    with jax.set_mesh(support.mesh_of()):
        gradient = jax.jit(jax.grad(lambda u: chunked(args[0], u, *args[2:], options())[0]))
        program = gradient.lower(args[1]).as_text()
        got = gradient(args[1])
    sums = [line for line in program.splitlines() if "stablehlo.add" in line or "dot_general" in line]
    assert any("-> tensor<24x16xf32>" in line for line in sums)
    assert not any("tensor<24x16xbf16>" in line.split("->")[-1] for line in sums)
    want = jax.grad(lambda u: reference(args[0].astype(jnp.float32), u, *args[2:], options())[0])(args[1])
    np.testing.assert_allclose(got, want, atol=0.1)


@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
def test_in_bfloat16_the_table_gradient_of_what_is_nearly_certain_is_not_lost_in_rounding(soft_cap):
    _, unembedding, targets, weights = example(jnp.bfloat16)
    unembedding = unembedding.astype(jnp.bfloat16).astype(jnp.float32)
    hidden = unembedding[targets].astype(jnp.bfloat16)

    def loss(function, hidden):
        return lambda table: function(hidden, table, targets, weights, options(soft_cap=soft_cap))[0]

    with jax.set_mesh(support.mesh_of()):
        got = jax.jit(jax.grad(loss(chunked, hidden)))(unembedding)
    mean, want = jax.value_and_grad(loss(reference, hidden.astype(jnp.float32)))(unembedding)
    assert mean / jnp.sum(weights) < 0.1
    assert jnp.linalg.norm(got - want) < 4e-3 * jnp.linalg.norm(want)


def test_a_scaled_loss_has_scaled_gradients():
    args = example(jnp.float32)
    with jax.set_mesh(support.mesh_of()):
        once = jax.grad(lambda h: chunked(h, *args[1:], options())[0])(args[0])
        thrice = jax.grad(lambda h: 3 * chunked(h, *args[1:], options())[0])(args[0])
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def test_whole_logits_never_exist():
    args = example(jnp.float32)
    with jax.set_mesh(support.mesh_of()):
        compiled = jax.jit(jax.grad(lambda h: chunked(h, *args[1:], options())[0])).lower(args[0]).compile()
    assert "f32[24,32]" in compiled.as_text()
    text = compiled.as_text()
    assert not any(shape in text for shape in ("[8,12,24]", "[24,8,12]", "[24,96]", "[96,24]"))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("vocab_padding", [0, 7])
def test_greedy_takes_the_highest_logit_that_is_no_padding(sizes, vocab_padding):
    hidden, unembedding, _, _ = example(jnp.float32)
    scores = np.einsum("btd,vd->btv", hidden, unembedding)[..., : 24 - vocab_padding]
    with jax.set_mesh(support.mesh_of(*sizes)):
        got = jax.jit(lambda h, u: cross_entropy.greedy(h, u, options(vocab_padding=vocab_padding)))(
            hidden, unembedding
        )
    np.testing.assert_array_equal(got, scores.argmax(-1))


def test_of_equal_logits_the_first_wins():
    hidden, unembedding, _, _ = example(jnp.float32)
    with jax.set_mesh(support.mesh_of(1, 2, 4)):
        got = cross_entropy.greedy(hidden, jnp.concatenate([unembedding[:12]] * 2), options())
    assert int(got.max()) < 12
