"""TPU topologies by the names people use: v5e-8, v5litepod-16, v6e-256; their devices, without any TPU.

The devices come from `libtpu`, which compiles for them on a CPU.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from MaxText import hardware

if TYPE_CHECKING:  # else only after prepare_environment
    import jax

# Chips -> the grid they are wired in.
GRIDS = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_FAMILIES = {"v5e": "v5e", "v5litepod": "v5e", "v6e": "v6e"}
_NAME = re.compile(r"(?P<family>[a-z0-9]+)-(?P<chips>\d+)(?P<hosts>-2hosts)?")


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice of TPU chips."""

    name: str  # as given
    family: str  # v5e or v6e
    chips: int
    single_host: bool  # all chips belong to one process

    @property
    def chip(self) -> hardware.Chip:
        """The published figures of one chip."""
        return hardware.CHIPS[f"tpu {self.family}"]


def parse(name: str) -> Topology:
    """The topology of that name.

    Args:
        name: v5e-N, v5litepod-N or v6e-N; eight chips are one host's, with `-2hosts` two hosts' of four.

    Raises:
        ValueError: there is no such topology.
    """
    match = _NAME.fullmatch(name.strip().lower())
    family = _FAMILIES.get(match["family"]) if match else None
    if (
        match is None
        or family is None
        or int(match["chips"]) not in GRIDS
        or (match["hosts"] and match["chips"] != "8")
    ):
        raise ValueError(
            f"compile_topology={name!r} is not known; known are v5e-N, v5litepod-N and v6e-N, with N one of "
            f"{', '.join(map(str, GRIDS))}, and v5e-8-2hosts and v6e-8-2hosts"
        )
    chips = int(match["chips"])
    return Topology(name, family, chips, chips == 1 or (chips == 8 and not match["hosts"]))


def prepare_environment(environ: MutableMapping[str, str]) -> None:
    """Tells JAX and libtpu that no TPU is meant to be here. Call it before JAX is imported."""
    environ["JAX_PLATFORMS"] = "cpu"
    environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")


def devices(topology: Topology, num_slices: int) -> "list[jax.Device]":
    """The devices of so many slices: good for meshes, shardings and compiling, and for nothing else.

    Raises:
        ValueError: the TPU compiler is not installed.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed; bash setup.sh --tpu-compiler installs it")
    assert os.environ.get("TPU_SKIP_MDS_QUERY"), "prepare_environment was not called"
    rows, columns = GRIDS[topology.chips]
    options: dict[str, object] = {"num_slices": num_slices} if num_slices > 1 else {}
    if topology.single_host:
        options["chips_per_host_bounds"] = (rows, columns, 1)
    name = f"{topology.family}:{rows}x{columns}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
