"""The attention entry point against a loop over positions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxText.kernels import attention


def by_hand(query, key, value, segment_ids):
    batch, length, heads, dim = query.shape
    group = heads // key.shape[2]
    out = np.zeros(query.shape)
    for b in range(batch):
        for t in range(length):
            seen = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
            for n in range(heads):
                scores = key[b, seen, n // group].astype(np.float64) @ query[b, t, n] / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ value[b, seen, n // group]
    return out


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("implementation", sorted(attention.IMPLEMENTATIONS))
def test_matches_a_loop_over_positions(implementation, num_kv_heads):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 7, 4, 8)).astype(np.float32)
    key, value = (rng.normal(size=(2, 7, num_kv_heads, 8)).astype(np.float32) for _ in range(2))
    segment_ids = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)
    got = attention.attention(*map(jnp.asarray, (query, key, value, segment_ids)), implementation=implementation)
    np.testing.assert_allclose(got, by_hand(query, key, value, segment_ids), atol=1e-5)


def test_bfloat16_in_bfloat16_out():
    x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    out = attention.attention(x, x, x, jnp.ones((1, 4), jnp.int32), implementation="autoselected")
    assert out.dtype == jnp.bfloat16


def test_unknown_implementation_is_named():
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="attention='fast' is none of"):
        jax.eval_shape(lambda x: attention.attention(x, x, x, jnp.ones((1, 4), jnp.int32), implementation="fast"), x)


@pytest.mark.parametrize("implementation", sorted(set(attention.IMPLEMENTATIONS) - {"dot_product"}))
@pytest.mark.parametrize("length", [1, 3, 8, 17])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_match_the_reference(implementation, length, num_kv_heads, dtype):
    rng = np.random.default_rng(length)
    query = jnp.asarray(rng.normal(size=(2, length, 4, 8)), dtype)
    key, value = (jnp.asarray(rng.normal(size=(2, length, num_kv_heads, 8)), dtype) for _ in range(2))
    segment_ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, length))), jnp.int32)
    weight = jnp.asarray(rng.normal(size=query.shape), jnp.float32)

    def value_and_gradients(name):
        def loss(*qkv):
            out = attention.attention(*qkv, segment_ids, implementation=name)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(query, key, value)

    (_, want), want_gradients = value_and_gradients("dot_product")
    (_, got), gradients = value_and_gradients(implementation)
    tolerance = 1e-5 if dtype == jnp.float32 else 6e-2
    for ours, theirs in zip((got, *gradients), (want, *want_gradients), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=tolerance)
