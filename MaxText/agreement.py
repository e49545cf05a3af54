"""What all processes of a run must agree on: that they run the same thing, and after which step they stop.

A process that stopped alone would leave the others in a collective that never ends.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from MaxText import sharding
from MaxText.processes import Processes

HEARTBEAT_SECONDS = 60  # without any of a process: it is lost, and the others end


def join(processes: Processes) -> None:
    """Joins the other processes of the run, if there are any; before anything else is asked of JAX."""
    if processes.count == 1:
        return
    # JAX's own handler of SIGTERM would replace ours.
    jax.config.update("jax_enable_preemption_service", False)
    if processes.coordinator:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    else:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def leave() -> None:
    """Leaves the other processes when all of them have come here."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def is_lost_process(error: Exception) -> bool:
    """Whether a run of several processes fails because another one, or the network to it, is gone."""
    own = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")  # of memory and of compiling: not of the others
    several = jax.distributed.is_initialized() and isinstance(error, jax.errors.JaxRuntimeError)
    return several and not any(code in str(error) for code in own)


def from_first_process(function: Callable[[], int]) -> int:
    """The number that the first process finds; its error ends the others too, as they wait for it."""
    if jax.process_count() == 1:
        return function()
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(function() if jax.process_index() == 0 else 0)))


def check_same(values: Mapping[str, Any]) -> None:
    """Makes sure that every process has these values.

    Raises:
        ValueError: one has others than the first; names them.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digests = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:8] for value in values.values()]
    ours = np.frombuffer(b"".join(digests), np.int32).reshape(len(digests), 2)
    everyones = multihost_utils.process_allgather(ours)
    different = {
        name: [process for process, theirs in enumerate(everyones) if (theirs[row] != everyones[0][row]).any()]
        for row, name in enumerate(values)
    }
    wrong = [f"{name} on process {', '.join(map(str, where))}" for name, where in different.items() if where]
    if wrong:
        raise ValueError(
            f"not what process 0 has: {'; '.join(wrong)}. All processes need the same command, code and data; "
            f"here it is {dict(values)}"
        )


class StopTogether:
    """Whether any process was asked to stop, as all of them see it after the same step."""

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size,)
        self._any = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
        self._asked: jax.Array | None = None

    def __call__(self, asked: bool) -> bool:
        """Call once after every step, on every process; with several, the answer is that to the call before."""
        if self._alone:
            return asked

        def flags(index: Any) -> np.ndarray:
            return np.full(len(range(*index[0].indices(self._shape[0]))), asked, np.int32)

        before = self._asked
        self._asked = self._any(jax.make_array_from_callback(self._shape, self._where, flags))
        return before is not None and bool(jax.device_get(before))
