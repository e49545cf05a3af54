"""The one attention entry point: picks an implementation by name.

In and out are as in `attention_reference`. An implementation is a plain function with that signature.
"""

from collections.abc import Callable

from jaxtyping import Array, Float, Int

from MaxText.kernels.attention_blocked import attention_blocked
from MaxText.kernels.attention_reference import attention_reference

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"dot_product": attention_reference, "blocked": attention_blocked}


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    implementation: str,
) -> Float[Array, "B T N H"]:
    """Causal attention within each document of each row.

    Args:
        implementation: `autoselected` or a key of IMPLEMENTATIONS.

    Raises:
        ValueError: no such implementation.
    """
    return IMPLEMENTATIONS[chosen(implementation)](query, key, value, segment_ids)


def chosen(implementation: str) -> str:
    """The name of the implementation that serves.

    Raises:
        ValueError: there is no such implementation.
    """
    name = "blocked" if implementation == "autoselected" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention={name!r} is none of autoselected, {', '.join(IMPLEMENTATIONS)}")
    return name
