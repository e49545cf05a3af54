"""The one attention entry point: picks an implementation by name.

In and out are as in `attention_reference`; which implementation serves depends on the devices of the current mesh.
"""

import jax
from jaxtyping import Array, Float, Int

from MaxText.kernels.attention_blocked import attention_blocked
from MaxText.kernels.attention_reference import attention_reference

IMPLEMENTATIONS = ("dot_product", "blocked", "splash")
SPLASH_BLOCK = 512


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K W"],
    segment_ids: Int[Array, "B T"],
    *,
    implementation: str,
    batch_axes: tuple[str, ...],
    head_axis: str,
) -> Float[Array, "B T N W"]:
    """Causal attention within each document of each row.

    Args:
        implementation: `autoselected` or one of IMPLEMENTATIONS.
        batch_axes: mesh axes the rows are split over.
        head_axis: mesh axis the heads are split over.

    Raises:
        ValueError: no such implementation, or it cannot serve here.
    """
    name = chosen(implementation, platform(), query.shape[-1])
    if name == "dot_product":
        return attention_reference(query, key, value, segment_ids)
    if name == "blocked":
        return attention_blocked(query, key, value, segment_ids)
    from MaxText.kernels.splash import attention_splash  # here, because importing Pallas takes a quarter of a second

    return attention_splash(
        query,
        key,
        value,
        segment_ids,
        batch_axes=batch_axes,
        head_axis=head_axis,
        soft_cap=None,
        block=SPLASH_BLOCK,
        interpret=False,
    )


def platform() -> str:
    """cpu, gpu or tpu: what the devices of the current mesh are; cpu where there is no mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "cpu" if device is None else device.platform


def chosen(implementation: str, platform: str, head_dim: int) -> str:
    """The name of the implementation that serves on that platform.

    Raises:
        ValueError: there is no such implementation, or it cannot serve; with all reasons.
    """
    if implementation not in ("autoselected", *IMPLEMENTATIONS):
        raise ValueError(f"attention={implementation!r} is none of autoselected, {', '.join(IMPLEMENTATIONS)}")
    problems = []
    if platform != "tpu":
        problems.append(f"it runs on TPUs, and the mesh's devices are {platform} devices")
    if head_dim % 64:
        problems.append(f"it takes heads whose width is a multiple of 64, and head_dim is {head_dim}")
    if implementation == "splash" and problems:
        raise ValueError(f"attention=splash cannot serve: {'; '.join(problems)}. attention=autoselected takes what can")
    if implementation == "autoselected":
        return "blocked" if problems else "splash"
    return implementation
