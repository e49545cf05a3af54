"""Estimates how long train_10m.py trains on a TPU, with the TPU compiler and without a TPU.

.venv/bin/python benchmarks/train_10m_tpu.py --topology v5e-8     # after: bash setup.sh --tpu-compiler

Compiles the very training step of train_10m.py and prints one JSON line. Two accounts of a step's time are given, both
estimates: the sum of the compiler's cycles, which is too high for elementwise work, and those of matrix products
with the bytes of all else at the published bandwidth, which is too low. Reading the data is not in either.
"""

import argparse
import datetime
import json
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Prints the estimate, and adds it to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e-8", help="v5e-8 (Kaggle), v5e-1 or v6e-1 (Colab), ...")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--output", type=pathlib.Path, help="JSON lines file to add the result to")
    arguments = parser.parse_args()

    from MaxText.aot import topologies

    topologies.prepare_environment(os.environ)
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import train_10m
    from MaxText.aot import cost, hlo

    topology = topologies.parse(arguments.topology)
    mesh = Mesh(np.array(topologies.devices(topology, num_slices=1)), ("data",))
    train_10m.sharding = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    config = train_10m.CONFIG
    rows = config.batch_size_per_device * mesh.size

    def placed(leaf: jax.ShapeDtypeStruct, *axes: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=train_10m.sharding(*axes))

    state = jax.tree.map(placed, jax.eval_shape(lambda: train_10m.create_train_state.__wrapped__(config)))
    batch = {
        "input_ids": placed(jax.ShapeDtypeStruct((rows, config.max_seq_len + 1), np.int32), "data"),
        "length": placed(jax.ShapeDtypeStruct((rows,), np.int32), "data"),
    }
    begin = time.perf_counter()
    compiled = train_10m.train_step.lower(state, batch).compile()
    seconds = time.perf_counter() - begin
    stats, text = compiled.memory_analysis(), compiled.as_text()
    assert stats is not None and text is not None
    spent = cost.account(hlo.parse(text), topology.family, topology.chip.hbm_bandwidth, {"data": mesh.size})
    low = spent.matmul_seconds + spent.memory_seconds + spent.exposed_seconds
    high = spent.plain_cycles / cost.CYCLES_PER_SECOND[topology.family]
    tokens = rows * config.max_seq_len
    result = {
        "what": "train_10m.py, estimated by the TPU compiler; no TPU has run it",
        "topology": topology.name,
        "tokens_per_step": tokens,
        "steps": arguments.steps,
        "estimated_ms_per_step": [round(1e3 * low, 2), round(1e3 * high, 2)],
        "estimated_minutes": [round(arguments.steps * each / 60, 2) for each in (low, high)],
        "estimated_tokens_per_second": [round(tokens / each) for each in (high, low)],
        "peak_memory_gib": round(stats.peak_memory_in_bytes / 2**30, 2),
        "memory_gib": round(topology.chip.hbm_bytes / 2**30, 2),
        "compile_seconds": round(seconds, 1),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(result))
    if arguments.output:
        with arguments.output.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
