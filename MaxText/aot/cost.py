"""What a compiled step costs, by the compiler's own cycle estimates and the bytes each operation moves. An estimate.

Two accounts. `plain_cycles` is the sum of the compiler's estimated cycles over all executed operations; it knows no
Pallas kernel and is three to five times too high for elementwise work. The second takes those cycles for matrix
products only, the simulator's for our kernels, and for all else the bytes through HBM at the published bandwidth.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping

from MaxText.aot import communication
from MaxText.aot.hlo import Instruction, Module
from MaxText.kernels import flash_blocks

CYCLES_PER_SECOND = {"v5e": 1.5e9, "v6e": 1.75e9}  # the clock of the compiler's own schedules
DEVICE_KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}  # as JAX calls them
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"}
_FREE |= {"partition-id", "replica-id", "iota", "opt-barrier"}


@dataclasses.dataclass
class Transfers:
    """All transfers of one kind over one set of mesh axes."""

    count: int = 0
    bytes: int = 0  # of the results, on one device
    seconds: float = 0.0
    exposed_seconds: float = 0.0  # while nothing else runs


@dataclasses.dataclass(frozen=True)
class Cost:
    """One step of one device; seconds are estimates."""

    plain_cycles: int
    matmul_seconds: float
    memory_seconds: float
    hbm_bytes: int
    pallas_calls: dict[str, int]  # kernel -> executions
    pallas_bytes: int
    pallas_seconds: float  # of a kernel in pallas_unknown, what its bytes take
    pallas_unknown: tuple[str, ...]  # kernels whose cycles are not known
    collectives: dict[tuple[str, str], Transfers]  # (kind, mesh axes; of the host's copies PCIe)

    @property
    def exposed_seconds(self) -> float:
        """Communication that nothing hides."""
        return sum(c.exposed_seconds for c in self.collectives.values())


def account(
    module: Module,
    family: str,
    hbm_bandwidth: float,
    axes: dict[str, int],
    slices: Mapping[str, int] | None = None,
) -> Cost:
    """The cost of one step.

    Args:
        family: v5e or v6e.
        hbm_bandwidth: bytes/s of one chip.
        axes: mesh axis -> size within a slice, in the order the devices are numbered.
        slices: mesh axis -> slices along it; None for one slice.
    """
    clock = CYCLES_PER_SECOND[family]
    plain = matmul_cycles = memory_bytes = hidden_bytes = pallas_bytes = 0
    kernels: dict[str, int] = defaultdict(int)
    collectives: dict[tuple[str, str], Transfers] = defaultdict(Transfers)
    arrives: dict[str, float] = {}  # a transfer under way -> the time at which it has been sent
    free: dict[str, float] = defaultdict(float)  # link -> the time from which it sends nothing
    unknown: set[str] = set()
    elapsed = pallas_seconds = 0.0
    for instruction, times in module.scheduled():
        plain += instruction.estimated_cycles * times
        opcode = instruction.opcode
        if opcode in _FREE:
            continue
        transfer = communication.transfer_in(module, instruction)
        if transfer is not None and transfer.phase != "middle":
            axes_of_group, seconds = communication.sent(transfer, family, axes, slices or {})
            if transfer.chain not in arrives:
                arrives[transfer.chain] = free[transfer.link] = max(elapsed, free[transfer.link]) + seconds
            if transfer.phase == "start":
                continue
            exposed = max(0.0, arrives.pop(transfer.chain) - elapsed)
            elapsed += exposed
            total = collectives[transfer.kind, axes_of_group]
            total.count += times
            total.bytes += sum(shape.bytes for shape in transfer.shapes) * times
            total.seconds += seconds * times
            total.exposed_seconds += exposed * times
            hidden_bytes += sum(shape.bytes for shape in (*transfer.operands, *transfer.shapes) if shape.in_hbm) * times
        elif opcode.endswith("-start") or (transfer is not None and transfer.link == communication.DCN):
            continue
        elif opcode.endswith("-done"):
            hidden_bytes += sum(shape.bytes for shape in instruction.shapes) * times
        elif opcode == "custom-call":
            if "tpu_custom_call" in instruction.attributes:
                name, moved = _kernel_name(instruction), _bytes(module, instruction)
                cycles = kernel_cycles(module, instruction, family)
                seconds = max(moved / hbm_bandwidth, (cycles or 0) / clock)
                if cycles is None:
                    unknown.add(name)
                kernels[name] += times
                pallas_bytes += moved * times
                pallas_seconds += seconds * times
                elapsed += seconds
        elif module.is_matmul(instruction):
            matmul_cycles += instruction.estimated_cycles * times
            elapsed += instruction.estimated_cycles / clock
            hidden_bytes += _bytes(module, instruction) * times
        else:
            memory_bytes += _bytes(module, instruction) * times
            elapsed += _bytes(module, instruction) / hbm_bandwidth
    return Cost(
        plain,
        matmul_cycles / clock,
        memory_bytes / hbm_bandwidth,
        memory_bytes + hidden_bytes + pallas_bytes,
        dict(kernels),
        pallas_bytes,
        pallas_seconds,
        tuple(sorted(unknown)),
        dict(collectives),
    )


def kernel_cycles(module: Module, instruction: Instruction, family: str) -> float | None:
    """The simulator's estimate for a call of our flash kernels; None for another kernel or a shape not simulated."""
    kernel = re.search(r"flash_\d_(forward|backward)", f"{instruction.name} {instruction.attributes}")
    if kernel is None:
        return None
    arrays = [module.instructions[name].shapes[0] for name in instruction.operands]
    batch, heads, maps, length, head_dim = arrays[0].dims
    value = arrays[sum(len(array.dims) == 5 for array in arrays) + maps - 1]
    dtype = {"bf16": "bfloat16", "f32": "float32"}[arrays[0].dtype]
    shape = (DEVICE_KINDS[family], dtype, maps, head_dim, value.dims[-1])
    cycles = flash_blocks.cycles(kernel[1], shape, length)
    return None if cycles is None else cycles * batch * heads


def _bytes(module: Module, instruction: Instruction) -> int:
    """What crosses the memory bus: operands and results in HBM; of a stacked array or a table, what is touched."""
    called = instruction.called("calls") if instruction.opcode == "fusion" else []
    body = module.computations[called[0]] if called else ()
    inside = {i.name: i for i in body}
    parameters = {int(i.attributes.split(")")[0]): i.name for i in body if i.opcode == "parameter"}
    total = 0
    for index, name in enumerate(instruction.operands):
        shapes = module.instructions[name].shapes
        if len(shapes) != 1 or not shapes[0].in_hbm:
            continue
        users = [i for i in body if parameters.get(index) in i.operands] if body else [instruction]
        if users and all(
            i.opcode in ("dynamic-slice", "gather") and i.operands[0] == parameters.get(index, name) for i in users
        ):
            total += sum(shape.bytes for i in users for shape in i.shapes)
        elif users and all(
            i.opcode == "dynamic-update-slice" and i.operands[0] == parameters.get(index, name) for i in users
        ):
            continue
        else:
            total += shapes[0].bytes
    updates = [i for i in (body or (instruction,)) if i.opcode == "dynamic-update-slice"]
    for shape in instruction.shapes:
        update = next((i for i in updates if i.shapes[0].dims == shape.dims), None)
        if not shape.in_hbm:
            continue
        if update is not None:
            source = inside.get(update.operands[1]) or module.instructions.get(update.operands[1])
            total += source.shapes[0].bytes if source is not None else shape.bytes
        else:
            total += shape.bytes
    return total


def _kernel_name(instruction: Instruction) -> str:
    match = re.search(r"kernel_name\W+([\w.\-]+)", instruction.attributes)
    return (
        match[1]
        if match
        else instruction.op_name.rsplit("/", 2)[-2]
        if "/" in instruction.op_name
        else instruction.name
    )
