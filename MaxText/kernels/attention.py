"""The one attention entry point: picks an implementation by name.

In and out are as in `attention_reference`; which implementation serves depends on the devices of the current mesh.
"""

import functools
import logging

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from MaxText.kernels.attention_blocked import attention_blocked
from MaxText.kernels.attention_cached import CachedRows, attention_cached
from MaxText.kernels.attention_cudnn import attention_cudnn
from MaxText.kernels.attention_reference import RESIDUALS, attention_reference

IMPLEMENTATIONS = ("dot_product", "blocked", "flash", "splash", "cudnn")
SPLASH_BLOCK = 512

Shape = tuple[int, int, int, int, int]  # length of a row, maps, keys for them, head dim, value width


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K W"],
    segment_ids: Int[Array, "B T"] | CachedRows,
    *,
    implementation: str,
    batch_axes: tuple[str, ...],
    head_axis: str,
) -> Float[Array, "B T N W"]:
    """Causal attention within each document of each row; what it keeps for the backward pass is named `context`.
    S is T, unless the keys come from a cache.

    Args:
        segment_ids: of each document of a row; or where the row stands in its cache.
        implementation: `autoselected` or one of IMPLEMENTATIONS.
        batch_axes: mesh axes the rows are split over.
        head_axis: mesh axis the heads are split over.

    Raises:
        ValueError: no such implementation, or it cannot serve here.
    """
    if isinstance(segment_ids, CachedRows):
        return attention_cached(query, key, value, segment_ids)
    name = serving(implementation, (query.shape[1], 1, 1, query.shape[-1], value.shape[-1]), query.dtype.name)
    if name == "blocked":
        return attention_blocked(query, key, value, segment_ids)
    if name == "dot_product":
        return checkpoint_name(attention_reference(query, key, value, segment_ids), RESIDUALS)
    axes = {"batch_axes": batch_axes, "head_axis": head_axis}
    if name == "cudnn":
        return checkpoint_name(attention_cudnn(query, key, value, segment_ids, **axes), RESIDUALS)
    # Imported here, because importing Pallas takes a quarter of a second.
    if name == "flash":
        from MaxText.kernels.attention_flash import attention_flash

        return attention_flash(query, key, value, segment_ids, **axes, chip=chip(), interpret=False)
    from MaxText.kernels.splash import attention_splash

    options = {"soft_cap": None, "block": SPLASH_BLOCK, "has_fused_backward": False, "interpret": False}
    return attention_splash(query, key, value, segment_ids, **axes, **options)


def platform() -> str:
    """cpu, gpu or tpu: what the devices of the current mesh are; cpu where there is no mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "cpu" if device is None else device.platform


def chip() -> str:
    """What kind of devices the current mesh has, as JAX calls it; empty where there is no mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "" if device is None else device.device_kind


def compute_capability() -> float:
    """Of this process's first device, as NVIDIA counts; 0 of a device that is not NVIDIA's."""
    try:
        return float(getattr(jax.local_devices()[0], "compute_capability", 0))
    except ValueError:  # AMD's are words
        return 0.0


def serving(implementation: str, shape: Shape, dtype: str) -> str:
    """As `chosen`, on the current mesh; of rows too long for flash `autoselected` takes splash, and says so once."""
    name = chosen(implementation, platform(), shape[3], dtype)
    if implementation == "autoselected" and name == "flash":
        return "flash" if _flash_serves(chip(), shape, dtype) else "splash"
    return name


@functools.cache
def _flash_serves(chip: str, shape: Shape, dtype: str) -> bool:
    from MaxText.kernels import flash_blocks

    try:
        flash_blocks.plan(chip, *shape, dtype, interpret=False)
    except ValueError as error:
        logging.getLogger(__name__).warning("attention=autoselected takes splash: %s", error)
        return False
    return True


def chosen(implementation: str, platform: str, head_dim: int, dtype: str) -> str:
    """The name of the implementation that serves on that platform.

    Raises:
        ValueError: there is no such implementation, or it cannot serve; with all reasons.
    """
    if implementation not in ("autoselected", *IMPLEMENTATIONS):
        raise ValueError(f"attention={implementation!r} is none of autoselected, {', '.join(IMPLEMENTATIONS)}")
    if implementation == "autoselected":
        kernels = {"tpu": "flash", "gpu": "cudnn"}
        name = kernels.get(platform, "blocked")
        return "blocked" if _problems(name, platform, head_dim, dtype) else name
    if problems := _problems(implementation, platform, head_dim, dtype):
        raise ValueError(
            f"attention={implementation} cannot serve: {'; '.join(problems)}. attention=autoselected takes what can"
        )
    return implementation


def _problems(name: str, platform: str, head_dim: int, dtype: str) -> list[str]:
    problems = []
    if name in ("flash", "splash"):
        if platform != "tpu":
            problems.append(f"it runs on TPUs, and the mesh's devices are {platform} devices")
        if head_dim % 64:
            problems.append(f"it takes heads whose width is a multiple of 64, and head_dim is {head_dim}")
    if name == "cudnn":
        if platform != "gpu":
            problems.append(f"it runs on NVIDIA GPUs, and the mesh's devices are {platform} devices")
        elif compute_capability() < 8:
            problems.append(f"it needs compute capability 8.0, NVIDIA's Ampere, and this is {compute_capability()}")
        if head_dim % 8 or head_dim > 128:
            problems.append(f"it takes heads whose width is a multiple of 8 up to 128, and head_dim is {head_dim}")
        if dtype != "bfloat16":
            problems.append(f"it computes in bfloat16, and dtype is {dtype}")
    return problems
