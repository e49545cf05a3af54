"""What an instruction of a compiled step sends to other chips, to other slices or to the host, and how long that takes.

`transfer_in` reads it from the program; `sent` estimates the seconds. Assumed are rings over two of a chip's links, and
the bandwidth to the host, of which nothing is published.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from MaxText.aot.hlo import Instruction, Module, Shape

# What a chip sends in a ring: over two of its four links. Google Cloud's pages on TPU v5e and v6e give 1,600 and 3,200
# Gbit/s for all four, and for the data-centre network 6.4 and 25.6 Tbit/s for the 256 chips of a pod.
ICI_BYTES_PER_SECOND = {"v5e": 2 * 1600e9 / 8 / 4, "v6e": 2 * 3200e9 / 8 / 4}
DCN_BYTES_PER_SECOND = {"v5e": 6.4e12 / 8 / 256, "v6e": 25.6e12 / 8 / 256}
DCN = "dcn "  # begins the kind of a collective between slices
HOST_COPY = "host copy"  # the kind of what goes to the host's memory or comes from it
HOST_BYTES_PER_SECOND = 16e9  # assumed: eight lanes of PCIe 4.0, one copy at a time; Google publishes no figure
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective, or a copy to or from the host, that an instruction is, begins, ends, or carries on."""

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


def transfer_in(module: Module, instruction: Instruction) -> Transfer | None:
    """The transfer in an instruction; None where there is none.

    The compiler writes collectives in four ways: by themselves, as a pair of -start and -done, as a chain of fusions:
    one that starts, matrix products meanwhile, and one that ends; and between slices as a send and a recv of one name.
    """
    begin = instruction
    if instruction.opcode.endswith("-done") and instruction.operands:
        begin = module.instructions[instruction.operands[0]]
    if begin.opcode in ("send", "recv"):
        return _between_slices(instruction, begin)
    if moved := _host_copy(module, begin):
        return Transfer(HOST_COPY, _phase(instruction), begin.name, begin, (), (moved,))
    for kind in _COLLECTIVES:
        if begin.opcode in (kind, f"{kind}-start"):
            operands, results = _operands(module, begin), instruction.shapes
            if instruction.opcode.endswith("-start"):  # its own result may have the operands before the results
                results = results[len(operands) : 2 * len(operands)] or results
            return Transfer(kind, _phase(instruction), begin.name, begin, operands, results)
    called = begin.called("calls") if begin.opcode in ("fusion", "async-start") else []
    body = module.computations[called[0]] if called else ()
    inner = next((i for i in body if i.opcode in _COLLECTIVES), None)
    if inner is None:
        return None
    operands = _operands(module, inner)
    if begin is not instruction:
        return Transfer(inner.opcode, "done", begin.name, inner, operands, instruction.shapes)
    channel = re.search(r"channel_id=(\d+)", inner.attributes)
    chain = f"channel {channel[1]}" if channel else inner.name
    targets = {match[1] for i in body if (match := re.search(r'target="AsyncCollective(\w+)"', i.attributes))}
    if targets:
        return Transfer(inner.opcode, targets.pop().lower(), chain, inner, operands, inner.shapes)
    if module.is_matmul(instruction):
        return Transfer(inner.opcode, "middle", chain, inner, operands, inner.shapes)
    kind = "reduce-scatter" if "all-reduce-scatter" in called[0] else inner.opcode
    shapes = inner.shapes if begin.opcode == "async-start" else instruction.shapes
    return Transfer(kind, _phase(instruction), begin.name, inner, operands, shapes)


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
    on_chip = there if moved.in_host else moved
    return dataclasses.replace(moved, memory_space=on_chip.memory_space)


def _phase(instruction: Instruction) -> str:
    ending = instruction.opcode.rpartition("-")[2]
    return ending if ending in ("start", "done") else "whole"


def _between_slices(instruction: Instruction, begin: Instruction) -> Transfer | None:
    """What a send starts and the end of the recv of its name ends; None for a transfer to the host."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', begin.attributes)
    name = re.search(r'_rendezvous="([^"]*)"', begin.attributes)
    if not transfer or not name:
        return None
    phase = {"send": "start", "recv-done": "done"}.get(instruction.opcode, "middle")
    kind = DCN + transfer[1].lower().replace("_", "-")
    return Transfer(kind, phase, name[1], begin, instruction.shapes[:1], instruction.shapes[:1])


def _operands(module: Module, instruction: Instruction) -> tuple[Shape, ...]:
    return tuple(shape for name in instruction.operands for shape in module.instructions[name].shapes)


def sent(transfer: Transfer, family: str, axes: dict[str, int], slices: Mapping[str, int]) -> tuple[str, float]:
    """The mesh axes of a transfer, or PCIe; and the seconds it takes on links that send nothing else."""
    moved = sum(shape.bytes for shape in transfer.shapes)
    if transfer.link == HOST_COPY:
        return "PCIe", moved / HOST_BYTES_PER_SECOND
    if transfer.link == DCN:
        crossed = "+".join(axis for axis, size in slices.items() if size > 1)
        traffic = _traffic(transfer.kind.removeprefix(DCN), math.prod(slices.values()))
        return crossed, moved * traffic / DCN_BYTES_PER_SECOND[family]
    crossed, members = _groups(transfer.instruction, axes)
    return crossed, moved * _traffic(transfer.kind, members) / ICI_BYTES_PER_SECOND[family]


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
