"""Which process of how many this is, by the environment alone: known before JAX is imported.

More than one only where that is certain: a launcher said so, Slurm started several tasks, or a TPU slice has several
hosts. Anything else trains alone; a wrong guess would wait for processes that never come.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those of a run."""

    index: int
    count: int
    coordinator: str  # host:port; empty where JAX finds it by itself


def find(environ: Mapping[str, str]) -> Processes:
    """This process, by what a launcher, Slurm or the TPU runtime have set.

    Raises:
        ValueError: JAX_COORDINATOR_ADDRESS without the two numbers that belong to it.
    """
    address = environ.get("JAX_COORDINATOR_ADDRESS", "")
    if address:
        try:
            return Processes(int(environ["JAX_PROCESS_ID"]), int(environ["JAX_PROCESS_COUNT"]), address)
        except (KeyError, ValueError):
            raise ValueError(
                f"JAX_COORDINATOR_ADDRESS={address} asks for several processes, but JAX_PROCESS_ID and "
                "JAX_PROCESS_COUNT are not both numbers; set all three, or none"
            ) from None
    if "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Processes(int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"]), "")
    hosts = [host for host in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    slices = int(environ.get("MEGASCALE_NUM_SLICES", "1"))
    if len(hosts) * slices > 1:
        index = int(environ.get("MEGASCALE_SLICE_ID", "0")) * len(hosts) + int(environ.get("TPU_WORKER_ID", "0"))
        return Processes(index, len(hosts) * slices, "")
    return Processes(0, 1, "")
