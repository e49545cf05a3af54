"""Compares generation with `transformers`' generate: the same weights, greedy, in one process, in turns.

In: a config that transformers has a model for, prompt length, new tokens, batch sizes, rounds. Out: one JSON line for
each batch size: tokens/s of both, of reading prompts, of writing and of both together, the ratios, and whether the
texts agree. Ours reads prompts one after the other, as a server gets them.
Run it from the repository's root: PYTHONPATH=.venv/torch .venv/bin/python -m benchmarks.generation
"""

import argparse
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime

import jax
import numpy as np
import torch
import transformers

from MaxText import hf_weights, models, pyconfig, sharding
from MaxText.inference import batcher, generate, program, runs, weights

GREEDY = batcher.Sampling(0.0, 0, 1.0, 0.0)


class NoTokenizer:
    """Tokens without text, and no end."""

    name, fingerprint, eos_id, special_ids = "none", "", -1, {}

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, texts):
        raise NotImplementedError

    def decode(self, ids):
        return "x" * len(ids)

    def token_bytes(self):
        raise NotImplementedError

    def save(self, directory):
        raise NotImplementedError


def torch_model(config, params):
    """A transformers Llama with these weights."""
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.base_emb_dim, intermediate_size=config.base_mlp_dim,
        num_hidden_layers=config.base_num_decoder_layers, num_attention_heads=config.base_num_query_heads,
        num_key_value_heads=config.base_num_kv_heads, head_dim=config.head_dim,
        rms_norm_eps=config.normalization_layer_epsilon, tie_word_embeddings=config.logits_via_embedding,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_max_timescale},
        max_position_embeddings=config.max_target_length, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape).eval()
    exported = hf_weights.to_hugging_face(jax.tree.map(np.asarray, params))
    model.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in exported.items()}, strict=False)
    return model


def ours(made, prompts, num_tokens):
    """(texts, seconds)."""
    completions = [batcher.Completion(0) for _ in prompts]
    begin = time.perf_counter()
    for prompt, completion in zip(prompts, completions, strict=True):
        made.submit(batcher.Request(prompt.tolist(), num_tokens, GREEDY, (), [completion]))
    made.run()
    return [completion.tokens for completion in completions], time.perf_counter() - begin


def theirs(model, prompts, num_tokens):
    """(texts, seconds)."""
    ids = torch.from_numpy(prompts.astype(np.int64))
    keys = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "use_cache": True}
    begin = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **keys)
    return out[:, prompts.shape[1] :].tolist(), time.perf_counter() - begin


def ours_reads(made, prompts):
    """Seconds to fill the memories with all prompts."""
    begin = time.perf_counter()
    with jax.set_mesh(made.program.mesh):
        jax.block_until_ready([made._read_prompt(prompt.tolist()) for prompt in prompts])
    return time.perf_counter() - begin


def theirs_reads(model, prompts):
    """The same."""
    ids = torch.from_numpy(prompts.astype(np.int64))
    begin = time.perf_counter()
    with torch.inference_mode():
        model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - begin


def compare(config, model, params, batch, args):
    """The record of one batch size."""
    made_program = program.Program(config, sharding.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    with jax.set_mesh(made_program.mesh):
        cut = weights.unstacked(jax.tree.map(lambda x: x + 0, params))
    tokenizer = NoTokenizer(config.vocab_size)
    context = args.prompt_tokens + args.new_tokens
    made = batcher.Batcher(made_program, cut, tokenizer, num_rows=batch, context=context)
    prompts = np.random.default_rng(0).integers(1, config.vocab_size, (batch, args.prompt_tokens)).astype(np.int32)
    systems = {"ours": lambda n: ours(made, prompts, n), "transformers": lambda n: theirs(model, prompts, n)}
    texts = {name: system(args.new_tokens)[0] for name, system in systems.items()}  # warm
    seconds = {(name, n): [] for name in systems for n in (1, args.new_tokens)}
    for _ in range(args.rounds):
        for (name, n), times in seconds.items():
            times.append(systems[name](n)[1])
    middle = {key: statistics.median(times) for key, times in seconds.items()}
    readers = {"ours": lambda: ours_reads(made, prompts), "transformers": lambda: theirs_reads(model, prompts)}
    reading = {name: statistics.median(read() for _ in range(2 * args.rounds)) for name, read in readers.items()}
    record = {"batch": batch, "same_texts": texts["ours"] == texts["transformers"]}
    for name in systems:
        first, whole = middle[name, 1], middle[name, args.new_tokens]
        record |= {
            f"{name}_first_token_seconds": round(first, 4),
            f"{name}_read_tokens_per_second": round(prompts.size / reading[name], 1),
            f"{name}_write_tokens_per_second": round(batch * (args.new_tokens - 1) / (whole - first), 1),
            f"{name}_tokens_per_second": round(batch * args.new_tokens / whole, 1),
        }
    keys = ("read_tokens_per_second", "write_tokens_per_second", "tokens_per_second")
    return record | {f"ratio_{key}": round(record[f"ours_{key}"] / record[f"transformers_{key}"], 2) for key in keys}


def guessing(directory, args):
    """The record of writing one text after the same prompt with and without guesses of the first head, in turns."""
    systems = {}
    for guesses in (0, 1):
        words = [directory, "dtype=float32", f"speculative_tokens={guesses}"]
        run = runs.find(words)
        systems[guesses] = generate.make_batcher(runs.load(run, run.newest()), num_rows=1)
    prompt = np.array([systems[0].tokenizer.encode(["def add(first, second):\n"])[0]])
    num_tokens = systems[0].context - prompt.size
    texts = {guesses: ours(made, prompt, num_tokens)[0] for guesses, made in systems.items()}  # warm
    seconds = {guesses: [] for guesses in systems}
    for _ in range(args.rounds):
        for guesses, made in systems.items():
            seconds[guesses].append(ours(made, prompt, num_tokens)[1])
    without, guessed = (statistics.median(seconds[guesses]) for guesses in (0, 1))
    return {
        "run": directory,
        "same_texts": texts[0] == texts[1],
        "tokens_per_step": round(systems[1].counts.tokens_per_step, 2),
        "tokens_per_second": round(len(texts[0][0]) / without, 1),
        "tokens_per_second_guessed": round(len(texts[1][0]) / guessed, 1),
        "ratio": round(without / guessed, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guessing", metavar="RUN", help="a trained run: writing with and without guesses instead")
    parser.add_argument("--config", default="configs/validate_10m.yml")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=129)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="append the lines to this file, too")
    args = parser.parse_args()
    when = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "cores": len(os.sched_getaffinity(0))}
    if args.guessing:
        report(when | {"jax": jax.__version__} | guessing(args.guessing, args), args.out)
        return
    config = pyconfig.initialize([args.config, "dtype=float32", "residual_init_scale=1.0"], {})
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    params = jax.jit(lambda key: models.initial_params(config, key))(jax.random.key(0))
    model = torch_model(config, params)
    machine = {"machine": platform.machine()}
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    shape = {"config": args.config, "dtype": "float32", "prompt": args.prompt_tokens, "new": args.new_tokens}
    for batch in args.batch:
        report(when | machine | versions | shape | compare(config, model, params, batch, args), args.out)


def report(record, out):
    """Prints a record as a line of JSON, and adds it to a file if one is named."""
    line = json.dumps(record)
    print(line, flush=True)
    if out:
        with open(out, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
