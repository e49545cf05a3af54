"""Writes or reads a checkpoint whose values everybody can compute: checkpoint_program.py VERB FOLDER FSDP TENSOR."""

import os
import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from MaxText import agreement, checkpointing, job, processes
from tests import support


def value(path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Random bits that depend on the array's name only."""
    rng = np.random.default_rng(list(path.encode()))
    return rng.integers(0, 2**20, shape).astype(dtype)


def main(verb: str, folder: str, fsdp: str, tensor: str) -> None:
    agreement.join(processes.find(os.environ))
    config = support.small_config(base_num_kv_heads=2, ici_fsdp_parallelism=fsdp, ici_tensor_parallelism=tensor)
    abstract = job.make_job(config, jax.devices()).abstract_state
    values = jax.tree_util.tree_map_with_path(
        lambda path, leaf: value(jax.tree_util.keystr(path), leaf.shape, leaf.dtype), abstract
    )
    info = {"config": config.to_dict()}
    saver = checkpointing.Checkpointer(pathlib.Path(folder) / "checkpoints", info, keep=2, asynchronous=True)
    if verb == "write":
        state = jax.tree.map(
            lambda leaf, whole: jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index]),
            abstract,
            values,
        )
        for step in (1, 2, 3):
            saver.save(state, step, {})
    else:
        state = saver.restore_newest(abstract, {})
        shards = 0
        for leaf, whole in zip(jax.tree.leaves(state), jax.tree.leaves(values), strict=True):
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[shard.index])
                shards += 1
        print(f"{shards} shards as written", flush=True)
    saver.close()
    agreement.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
