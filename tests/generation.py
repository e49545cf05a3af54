"""What the tests of generation share: a tokenizer of bytes, and small models with a batcher."""

import jax
import numpy as np

from MaxText import models
from MaxText.inference import batcher, program, weights
from tests import support

GREEDY = batcher.Sampling(0.0, 0, 1.0, 0.0)
WARM = batcher.Sampling(1.0, 0, 1.0, 0.0)


class ByteTokenizer:
    """Every byte is a token; 0 ends a text; 251 to 253 ask for a gap to be filled."""

    name, fingerprint = "bytes", ""
    eos_id = 0
    special_ids = {"fim_prefix": 251, "fim_suffix": 252, "fim_middle": 253}  # noqa: RUF012

    def __init__(self, vocab_size: int = 256):
        self.vocab_size = vocab_size

    def encode(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

    def token_bytes(self):
        return np.ones(self.vocab_size, np.int32)

    def save(self, directory):
        raise NotImplementedError


def make_batcher(num_rows=4, num_guesses=0, context=100, seed=0, mesh=None, tokenizer=None, **keys) -> batcher.Batcher:
    """Around a small model with random weights, larger than usual, so that its texts are no constants."""
    keys = {"vocab_size": 256, "initializer_range": 0.5, "base_num_kv_heads": 2, "max_target_length": 128} | keys
    config = support.small_config(**keys)
    mesh = mesh or support.mesh_of()
    made = program.Program(config, mesh, num_guesses)
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, weights.abstract_params(config, made.model, mesh))
        params = jax.jit(lambda key: models.initial_params(config, key), out_shardings=places)(jax.random.key(seed))
        cut = weights.unstacked(params)
    words = tokenizer or ByteTokenizer(config.vocab_size)
    return batcher.Batcher(made, cut, words, num_rows=num_rows, context=context)


def write(made: batcher.Batcher, prompt, seeds, max_tokens=12, sampling=GREEDY, stop=()) -> list[batcher.Completion]:
    """The completions of one prompt, given as tokens."""
    completions = [batcher.Completion(seed) for seed in seeds]
    made.submit(batcher.Request(list(prompt), max_tokens, sampling, stop, completions))
    made.run()
    return completions
