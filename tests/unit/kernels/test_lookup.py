"""The lookup in a split table against its reference twin: values and gradients, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxText import sharding
from MaxText.kernels.lookup import lookup, lookup_reference
from tests import support

AXES = {"batch_axes": sharding.BATCH_AXES, "vocab_axis": sharding.VOCAB_AXIS, "embed_axis": sharding.EMBED_AXIS}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_values_and_gradients(sizes, dtype):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)
    ids = jnp.asarray(rng.integers(-3, 30, (16, 12)), jnp.int32)  # some are out of range
    cotangent = jnp.asarray(rng.normal(size=(16, 12, 16)), dtype)

    def value_and_gradient(function):
        def loss(table):
            rows = function(table, ids, dtype)
            return jnp.sum(rows * cotangent, dtype=jnp.float32), rows

        return jax.jit(jax.grad(loss, has_aux=True))(table)

    want_gradient, want = value_and_gradient(lookup_reference)
    with jax.set_mesh(support.mesh_of(*sizes)):
        gradient, rows = value_and_gradient(lambda *args: lookup(*args, **AXES))
    np.testing.assert_array_equal(rows, want)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-6, atol=1e-5)
    assert gradient.dtype == jnp.float32


def test_neither_the_table_nor_its_gradient_crosses_the_network():
    mesh = support.mesh_of(1, 8, 1)
    place = jax.NamedSharding(mesh, jax.P(sharding.VOCAB_AXIS, sharding.EMBED_AXIS))
    rows = jax.NamedSharding(mesh, jax.P(sharding.BATCH_AXES))
    table = jax.ShapeDtypeStruct((4096, 64), jnp.float32, sharding=place)
    ids = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=rows)

    def loss(table, ids):
        return jnp.sum(jnp.sin(lookup(table, ids, "float32", **AXES)))

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss), out_shardings=place).lower(table, ids).compile().as_text()
    collectives = [line for line in program.splitlines() if " all-" in line or " reduce-scatter" in line]
    crossing = [line for line in collectives if "replica_groups={{0}" not in line]  # those are of one device each
    assert crossing and not [line for line in crossing if "4096" in line]
