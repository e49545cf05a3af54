"""What a compiled step costs, by the compiler's own cycle estimates and the bytes each operation moves. An estimate.

Two accounts. `plain_cycles` is the sum of the compiler's estimated cycles over all executed operations; it knows no
Pallas kernel and is three to five times too high for elementwise work. The second takes those cycles for matrix
products only, the simulator's for our kernels, and for all else the bytes through HBM at the published bandwidth.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping

from MaxText.aot.hlo import Instruction, Module, Shape
from MaxText.kernels import flash_blocks

CYCLES_PER_SECOND = {"v5e": 1.5e9, "v6e": 1.75e9}  # the clock of the compiler's own schedules
DEVICE_KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}  # as JAX calls them
# What a chip sends in a ring: over two of its four links. Google Cloud's pages on TPU v5e and v6e give 1,600 and 3,200
# Gbit/s for all four, and for the data-centre network 6.4 and 25.6 Tbit/s for the 256 chips of a pod.
ICI_BYTES_PER_SECOND = {"v5e": 2 * 1600e9 / 8 / 4, "v6e": 2 * 3200e9 / 8 / 4}
DCN_BYTES_PER_SECOND = {"v5e": 6.4e12 / 8 / 256, "v6e": 25.6e12 / 8 / 256}
DCN = "dcn "  # begins the kind of a collective between slices
HOST_COPY = "host copy"  # the kind of what goes to the host's memory or comes from it
HOST_BYTES_PER_SECOND = 16e9  # assumed: eight lanes of PCIe 4.0, one copy at a time; Google publishes no figure
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"}
_FREE |= {"partition-id", "replica-id", "iota", "opt-barrier"}


@dataclasses.dataclass
class Collective:
    """All executions of the collectives of one kind over one set of mesh axes; or of the host's copies."""

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
    collectives: dict[tuple[str, str], Collective]  # (kind, mesh axes; of the host's copies PCIe)

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
    collectives: dict[tuple[str, str], Collective] = defaultdict(Collective)
    arrives: dict[str, float] = {}  # a collective under way -> the time at which it has been sent
    free: dict[str, float] = defaultdict(float)  # link -> the time from which it sends nothing
    unknown: set[str] = set()
    elapsed = pallas_seconds = 0.0
    for instruction, times in module.scheduled():
        plain += instruction.estimated_cycles * times
        opcode = instruction.opcode
        if opcode in _FREE:
            continue
        found = _collective(module, instruction)
        if found is not None and found.phase != "middle":
            axes_of_group, seconds = _sent(found, family, axes, slices or {})
            if found.chain not in arrives:
                arrives[found.chain] = free[found.link] = max(elapsed, free[found.link]) + seconds
            if found.phase == "start":
                continue
            exposed = max(0.0, arrives.pop(found.chain) - elapsed)
            elapsed += exposed
            total = collectives[found.kind, axes_of_group]
            total.count += times
            total.bytes += sum(shape.bytes for shape in found.shapes) * times
            total.seconds += seconds * times
            total.exposed_seconds += exposed * times
            hidden_bytes += sum(shape.bytes for shape in (*found.operands, *found.shapes) if shape.in_hbm) * times
        elif opcode.endswith("-start") or (found is not None and found.link == DCN):
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
        elif _is_matmul(module, instruction):
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


def _is_matmul(module: Module, instruction: Instruction) -> bool:
    products = ("convolution", "dot")
    if instruction.opcode in products:
        return True
    called = instruction.called("calls")
    return bool(called) and any(i.opcode in products or _is_matmul(module, i) for i in module.computations[called[0]])


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


@dataclasses.dataclass(frozen=True)
class _Found:
    """A collective that an instruction is, ends, or carries on."""

    kind: str
    phase: str  # start, middle: beside a matrix product, done, or whole
    chain: str  # what its start and its end have in common
    instruction: Instruction  # with the groups
    operands: tuple[Shape, ...]
    shapes: tuple[Shape, ...]  # of the result

    @property
    def link(self) -> str:
        """What it is sent over: between slices, to or from the host, or within a slice."""
        if self.kind == HOST_COPY:
            return HOST_COPY
        return DCN if self.kind.startswith(DCN) else "ici"


def _collective(module: Module, instruction: Instruction) -> _Found | None:
    """The collective, or the host's copy, in an instruction; None where there is none.

    The compiler writes collectives in four ways: by themselves, as a pair of -start and -done, as a chain of fusions:
    one that starts, matrix products meanwhile, and one that ends; and between slices as a send and a recv of one name.
    """
    begin = instruction
    if instruction.opcode.endswith("-done") and instruction.operands:
        begin = module.instructions[instruction.operands[0]]
    if begin.opcode in ("send", "recv"):
        return _between_slices(instruction, begin)
    if moved := _host_copy(module, begin):
        return _Found(HOST_COPY, _phase(instruction), begin.name, begin, (), (moved,))
    for kind in _COLLECTIVES:
        if begin.opcode in (kind, f"{kind}-start"):
            operands, results = _operands(module, begin), instruction.shapes
            if instruction.opcode.endswith("-start"):  # its own result may have the operands before the results
                results = results[len(operands) : 2 * len(operands)] or results
            return _Found(kind, _phase(instruction), begin.name, begin, operands, results)
    called = begin.called("calls") if begin.opcode in ("fusion", "async-start") else []
    body = module.computations[called[0]] if called else ()
    inner = next((i for i in body if i.opcode in _COLLECTIVES), None)
    if inner is None:
        return None
    operands = _operands(module, inner)
    if begin is not instruction:
        return _Found(inner.opcode, "done", begin.name, inner, operands, instruction.shapes)
    channel = re.search(r"channel_id=(\d+)", inner.attributes)
    chain = f"channel {channel[1]}" if channel else inner.name
    targets = {match[1] for i in body if (match := re.search(r'target="AsyncCollective(\w+)"', i.attributes))}
    if targets:
        return _Found(inner.opcode, targets.pop().lower(), chain, inner, operands, inner.shapes)
    if _is_matmul(module, instruction):
        return _Found(inner.opcode, "middle", chain, inner, operands, inner.shapes)
    kind = "reduce-scatter" if "all-reduce-scatter" in called[0] else inner.opcode
    shapes = inner.shapes if begin.opcode == "async-start" else instruction.shapes
    return _Found(kind, _phase(instruction), begin.name, inner, operands, shapes)


def _host_copy(module: Module, begin: Instruction) -> Shape | None:
    """What goes to the host's memory or comes from it, as it lies on the chip; None for all else, and in fusions."""
    kind, operands = begin.opcode.removesuffix("-start"), _operands(module, begin)
    if kind not in ("copy", "dynamic-slice", "dynamic-update-slice"):
        return None
    if kind == "dynamic-update-slice":
        moved = operands[1]
    else:  # a slice that is only started has its operands before its result
        moved = begin.shapes[len(operands) if begin.opcode == "dynamic-slice-start" else 0]
    there = operands[0]
    if moved.in_host == there.in_host:
        return None
    return dataclasses.replace(moved, memory_space=there.memory_space if moved.in_host else moved.memory_space)


def _phase(instruction: Instruction) -> str:
    ending = instruction.opcode.rpartition("-")[2]
    return ending if ending in ("start", "done") else "whole"


def _between_slices(instruction: Instruction, begin: Instruction) -> _Found | None:
    """What a send starts and the end of the recv of its name ends; None for a transfer to the host."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', begin.attributes)
    name = re.search(r'_rendezvous="([^"]*)"', begin.attributes)
    if not transfer or not name:
        return None
    phase = {"send": "start", "recv-done": "done"}.get(instruction.opcode, "middle")
    kind = DCN + transfer[1].lower().replace("_", "-")
    return _Found(kind, phase, name[1], begin, instruction.shapes[:1], instruction.shapes[:1])


def _operands(module: Module, instruction: Instruction) -> tuple[Shape, ...]:
    return tuple(shape for name in instruction.operands for shape in module.instructions[name].shapes)


def _sent(found: _Found, family: str, axes: dict[str, int], slices: Mapping[str, int]) -> tuple[str, float]:
    """The mesh axes of a collective, or PCIe; and the seconds it takes on links that send nothing else."""
    moved = sum(shape.bytes for shape in found.shapes)
    if found.link == HOST_COPY:
        return "PCIe", moved / HOST_BYTES_PER_SECOND
    if found.link == DCN:
        crossed = "+".join(axis for axis, size in slices.items() if size > 1)
        traffic = _traffic(found.kind.removeprefix(DCN), math.prod(slices.values()))
        return crossed, moved * traffic / DCN_BYTES_PER_SECOND[family]
    crossed, members = _groups(found.instruction, axes)
    return crossed, moved * _traffic(found.kind, members) / ICI_BYTES_PER_SECOND[family]


def _groups(instruction: Instruction, axes: dict[str, int]) -> tuple[str, int]:
    """The mesh axes a collective runs over, and how many devices take part in each of its groups."""
    sizes = list(axes.values())
    found = _replica_groups(instruction.attributes, math.prod(sizes))
    if not found:
        return "+".join(axis for axis, size in axes.items() if size > 1), math.prod(sizes)
    first = sorted(found[0])
    for mask in range(1, 2 ** len(sizes)):
        chosen = [bool(mask >> i & 1) for i in range(len(sizes))]
        members = [0]
        for size, stride, in_group in zip(sizes, _strides(sizes), chosen, strict=True):
            if in_group:
                members = [m + k * stride for m in members for k in range(size)]
        if sorted(first[0] + m for m in members) == first:
            return "+".join(
                axis for axis, in_group in zip(axes, chosen, strict=True) if in_group and axes[axis] > 1
            ), len(first)
    return "other", len(first)


def _strides(sizes: list[int]) -> list[int]:
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]


def _replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of devices: {{0,1},{2,3}}, or in short [2,4]<=[4,2]T(1,0), or mesh['a'=4,'b'=2] {'a'}; of a permute,
    those that its pairs join.
    """
    if match := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        joined: list[list[int]] = []
        for pair in re.findall(r"(\d+),(\d+)", match[1]):
            group = {int(device) for device in pair}
            group |= {d for other in joined if group & set(other) for d in other}
            joined = [other for other in joined if not group & set(other)] + [sorted(group)]
        return joined
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        import numpy as np

        names, sizes = zip(*re.findall(r"('\w+')=(\d+)", match[1]), strict=True)
        chosen = [names.index(name.strip()) for name in match[2].split(",")]
        ids = np.arange(devices).reshape([int(size) for size in sizes])
        ids = np.moveaxis(ids, chosen, range(-len(chosen), 0))
        return ids.reshape(-1, math.prod(ids.shape[-len(chosen) :])).tolist()
    if match := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        import numpy as np

        shape, source = ([int(x) for x in match[i].split(",")] for i in (1, 2))
        ids = np.arange(devices).reshape(source)
        if match[3]:
            ids = ids.transpose([int(x) for x in match[3].split(",")])
        return ids.reshape(shape).tolist()
    return []


def _traffic(kind: str, size: int) -> float:
    """Bytes a device sends in a ring, for each byte of its result."""
    share = (size - 1) / size
    return {"all-reduce": 2 * share, "reduce-scatter": size - 1.0, "collective-permute": 1.0}.get(kind, share)


def _kernel_name(instruction: Instruction) -> str:
    match = re.search(r"kernel_name\W+([\w.\-]+)", instruction.attributes)
    return (
        match[1]
        if match
        else instruction.op_name.rsplit("/", 2)[-2]
        if "/" in instruction.op_name
        else instruction.name
    )
