"""Generation on a mesh of 8 devices writes what one device writes."""

import numpy as np
import pytest

from tests import generation, support

PROMPTS = [list(range(5, 5 + size)) for size in (1, 30, 9, 4)]
MODELS = [
    {"attention_type": "differential_v2", "mtp_num_layers": 1, "base_num_kv_heads": 2},
    {"attention_type": "differential", "base_num_kv_heads": 4},
]


def texts(made, sampling):
    completions = [generation.batcher.Completion(seed) for seed in range(len(PROMPTS))]
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        made.submit(generation.batcher.Request(prompt, 12, sampling, (), [completion]))
    made.run()
    return completions


@pytest.mark.parametrize("keys", MODELS)
def test_a_mesh_writes_what_one_device_writes(keys):
    one = generation.make_batcher(num_guesses=keys.get("mtp_num_layers", 0), context=50, **keys)
    many = generation.make_batcher(
        mesh=support.mesh_of(2, 2, 2), num_guesses=keys.get("mtp_num_layers", 0), context=50, **keys
    )
    for sampling in (generation.GREEDY, generation.WARM):
        ours, theirs = texts(many, sampling), texts(one, sampling)
        assert [c.tokens for c in ours] == [c.tokens for c in theirs]
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a.log_probabilities, b.log_probabilities, atol=1e-4)
    memory = many._rows.memories.layers[0].key
    assert len(memory.sharding.device_set) == 8
    assert memory.addressable_shards[0].data.size == memory.size // 8
