"""How the arrays of attention lie on the mesh where a kernel runs on each device's own rows and heads."""

from jax.sharding import PartitionSpec


def head_spec(num_heads: int, dimension: int, batch_axes: tuple[str, ...], head_axis: str) -> PartitionSpec:
    """Rows, the first dimension, over the batch axes; heads over the head axis, but a single head is on every device.

    Args:
        dimension: which one of the array's the heads are, from 0.
    """
    return PartitionSpec(batch_axes, *([None] * (dimension - 1) + [head_axis] if num_heads > 1 else []))
