"""The layers against their formulas, where no other library has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from MaxText import train_step
from MaxText.kernels.attention_reference import attention_reference
from MaxText.layers import dropout, rope
from MaxText.layers.attention import Attention
from MaxText.layers.differential_attention import DifferentialAttentionV2
from tests import support

OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def rotary(head_dim, factor=1.0, max_timescale=10000.0):
    return rope.Rotary(head_dim, max_timescale, factor, trained_length=2048, beta_fast=32.0, beta_slow=1.0)


def test_differential_v2_subtracts_neighbouring_heads_by_a_gate_of_the_token():
    """The publication's lines: attn[0::2] - sigmoid(lambda(x)) * attn[1::2]."""
    dim, heads, kv_heads, width, length = 12, 4, 2, 6, 7
    values = {"epsilon": 1e-6, "use_qk_norm": False, "implementation": "dot_product", "stddev": 0.5, "out_stddev": 0.5}
    types = {"dtype": "float32", "weight_dtype": "float32"}
    layer = DifferentialAttentionV2(dim, heads, kv_heads, width, **values, **types, rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (2, length, dim))
    positions = jnp.broadcast_to(jnp.arange(length)[None], (2, length))
    tables = rotary(head_dim=width).tables(positions)
    segments = jnp.ones((2, length), jnp.int32)
    with jax.set_mesh(support.mesh_of()):
        got = layer(x, *tables, segments, jnp.array(0))

    query, key, value = (jnp.einsum("btd,dnh->btnh", x, w[...]) for w in (layer.query, layer.key, layer.value))
    assert query.shape[2] == 2 * heads
    both = attention_reference(rope.rotate(query, *tables), rope.rotate(key, *tables), value, segments)
    gate = jax.nn.sigmoid(jnp.einsum("btd,dn->btn", x, layer.lambda_projection[...]))
    context = both[:, :, 0::2] - gate[..., None] * both[:, :, 1::2]
    np.testing.assert_allclose(got, jnp.einsum("btnh,nhd->btd", context, layer.out[...]), atol=1e-5)


def test_queries_and_keys_are_normalized_over_each_head_and_then_rotated():
    dim, heads, kv_heads, width, length = 12, 4, 2, 6, 7
    values = {"epsilon": 1e-6, "use_qk_norm": True, "implementation": "dot_product", "stddev": 0.5, "out_stddev": 0.5}
    types = {"dtype": "float32", "weight_dtype": "float32"}
    layer = Attention(dim, heads, kv_heads, width, **values, **types, rngs=nnx.Rngs(params=0))
    layer.query_norm.scale[...], layer.key_norm.scale[...] = 1.5 + jnp.arange(width), 2.5 - jnp.arange(width)
    x = jax.random.normal(jax.random.key(1), (2, length, dim))
    tables = rotary(head_dim=width).tables(jnp.broadcast_to(jnp.arange(length)[None], (2, length)))
    with jax.set_mesh(support.mesh_of()):
        query, key, value = layer.heads(x, *tables)
    for got, weight, scale in ((query, layer.query, 1.5 + np.arange(width)), (key, layer.key, 2.5 - np.arange(width))):
        projected = jnp.einsum("btd,dnh->btnh", x, weight[...])
        normalized = projected / np.sqrt(np.mean(np.square(projected), axis=-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(got, rope.rotate(normalized * scale[None, None, None], *tables), atol=1e-5)
    np.testing.assert_allclose(value, jnp.einsum("btd,dnh->btnh", x, layer.value[...]), atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0, 40.0])
@pytest.mark.parametrize(("head_dim", "max_timescale"), [(128, 10000.0), (64, 500000.0), (16, 10000.0)])
def test_yarn_has_the_tables_of_transformers(factor, head_dim, max_timescale):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 2048}
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=int(2048 * factor),
        rope_parameters=parameters | {"rope_theta": max_timescale},
    )
    positions = np.arange(0, 8192, 37)[None]
    rotary_of_theirs = LlamaRotaryEmbedding(config)
    frequencies = rotary(head_dim, factor, max_timescale).frequencies()
    np.testing.assert_allclose(rotary_of_theirs.inv_freq.numpy(), frequencies, rtol=1e-6)
    theirs = rotary_of_theirs(torch.zeros(1), torch.tensor(positions))
    # As a user compiles it: without optimization, as the tests are, XLA's powers are less exact.
    tables = jax.jit(rotary(head_dim, factor, max_timescale).tables, compiler_options=OPTIMIZED)
    ours = tables(jnp.asarray(positions))
    rounding = positions[..., None] * 2.0**-22  # of angles in float32: of theirs by twice a frequency's own
    for mine, other in zip(ours, theirs, strict=True):
        assert (np.abs(mine - other[..., : head_dim // 2].numpy()) <= 1e-6 + rounding).all()


def test_yarn_of_factor_one_is_the_identity():
    positions = jnp.arange(100)[None]
    stretched, plain = rotary(16, factor=1.0), rope.Rotary(16, 10000.0, 1.0, 7, 3.0, 2.0)
    for one, other in zip(stretched.tables(positions), plain.tables(positions), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(stretched.tables(positions)[0][0, :, 0], np.cos(np.arange(100)), atol=1e-5)


def test_dropout_drops_its_share_with_a_mask_for_each_row_place_and_step():
    x = jnp.ones((8, 32, 64))

    def dropped(step: int, place: int) -> np.ndarray:
        return np.asarray(dropout.dropout(x, 0.2, dropout.row_keys(0, jnp.array(step), 8), place))

    one = dropped(step=3, place=1)
    assert set(np.unique(one)) == {0.0, np.float32(2**16 / round(0.8 * 2**16))}
    np.testing.assert_allclose((one == 0).mean(axis=(1, 2)), 0.2, atol=0.05)  # 2,048 draws: 5.6 standard deviations
    np.testing.assert_array_equal(one, dropped(step=3, place=1))
    masks = [one, dropped(step=4, place=1), dropped(step=3, place=2)]
    rows = np.concatenate([mask.reshape(8, -1) for mask in masks])
    assert len(np.unique(rows, axis=0)) == 24
    assert dropout.dropout(x, 0.2, None, 1) is x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_halves_of_a_row_have_masks_of_their_own(dtype):
    x = jnp.ones((4, 33, 64), dtype)  # an odd length: the second half is one shorter
    out = dropout.dropout(x, 0.2, dropout.row_keys(0, jnp.array(0), 4), 1)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    first, second = np.asarray(out[:, :16] == 0), np.asarray(out[:, 17:] == 0)
    np.testing.assert_allclose(np.mean(first == second), 0.8**2 + 0.2**2, atol=0.04)  # 4,096 pairs: 5.5 deviations


def test_training_drops_and_evaluating_does_not():
    evaluated, trained = [], []
    for config in (support.small_config(dropout_rate=0.5), support.small_config()):
        trainer = support.Trainer(config, support.mesh_of())
        evaluate = train_step.make_eval_step(config, trainer.model, trainer.abstract, trainer.mesh)
        batch = support.packed_batch(config, rows=4, seed=0)
        with jax.set_mesh(trainer.mesh):
            sums = evaluate(trainer.state.params, batch, jnp.zeros(config.vocab_size, jnp.int32))
        evaluated.append(float(sums["nll"]))
        trained.append(trainer(batch)["learning/loss"])
    assert evaluated[0] == evaluated[1]
    assert abs(trained[0] - trained[1]) > 1e-4
