"""Both accounts of a program that the TPU compiler made for one chip: python -m benchmarks.account FILE v6e

For programs that are not ours, such as MaxText's (`benchmarks/peers/README.md`). Kernels that are not ours have no
simulated cycles in our table: --kernel gives them, by a part of their name, as cycles of one call.
"""

import argparse
import json
from pathlib import Path

from MaxText import hardware
from MaxText.aot import cost, hlo


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("chip", choices=cost.DEVICE_KINDS)
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME=CYCLES")
    arguments = parser.parse_args()
    chip = hardware.find_chip(cost.DEVICE_KINDS[arguments.chip])
    assert chip
    text = arguments.file.read_text()
    if "replica_groups=" in text:
        parser.error(f"{arguments.file} is a program of several chips; its communication is not accounted for here")
    axes = {"data": 1, "fsdp": 1, "tensor": 1}
    found = cost.account(hlo.parse(text), arguments.chip, chip.hbm_bandwidth, axes)
    known = {name: float(cycles) for name, cycles in (word.split("=") for word in arguments.kernel)}
    cycles = sum(c * calls for name, calls in found.pallas_calls.items() for part, c in known.items() if part in name)
    pallas = max(found.pallas_seconds, cycles / cost.CYCLES_PER_SECOND[arguments.chip])  # or what their bytes take
    record = {
        "plain_sum_megacycles": round(found.plain_cycles / 1e6, 1),
        "matmul_ms": round(1e3 * found.matmul_seconds, 1),
        "memory_ms": round(1e3 * found.memory_seconds, 1),
        "pallas_ms": round(1e3 * pallas, 1),
        "pallas_calls": found.pallas_calls,
        "step_ms": round(1e3 * (found.matmul_seconds + found.memory_seconds + pallas), 1),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
