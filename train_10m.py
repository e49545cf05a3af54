#!/usr/bin/env python3
"""
10M Parameter Python Code Model - Pipeline Validation
Run on Kaggle TPU v5e-8 or Google Colab TPU

In a notebook, paste the whole file into one cell, which only defines things. Then, in the next cells:

    validate_pipeline()                                     # every line should show a tick
    state = train(num_steps=1000)
    print(generate(state, tokenizer, "def fibonacci(n):"))

As a script: python train_10m.py [setting=value ...], for example num_steps=100 batch_size_per_device=2 where there is
no TPU. The settings are num_steps, log_every and the fields of Config.
"""

# ============ IMPORTS ============

import ast
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
import sys
import sysconfig
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

if os.environ.get("TPU_PROCESS_ADDRESSES") == "local":  # Kaggle sets it, and JAX would look for other hosts
    del os.environ["TPU_PROCESS_ADDRESSES"]
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss PyTorch; only its tokenizers are used

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization, struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

# ============ CONFIGURATION ============


def require(condition: bool, otherwise: str) -> None:
    """Raises a ValueError that says what is wrong, unless the condition holds."""
    if not condition:
        raise ValueError(otherwise)


@dataclasses.dataclass(frozen=True)
class Config:
    """The model and its training. Frozen, so that it can be a static argument of compiled functions."""

    vocab_size: int = 49152  # StarCoder2 tokenizer vocab size
    hidden_dim: int = 256  # Embedding dimension
    num_layers: int = 6  # Number of transformer blocks
    num_heads: int = 4  # Attention heads
    head_dim: int = 64  # hidden_dim // num_heads
    ffn_dim: int = 1024  # Feed-forward dimension (4x hidden)
    max_seq_len: int = 512  # Maximum sequence length
    dropout: float = 0.0  # No dropout for small model
    dtype: Any = jnp.bfloat16  # Use bfloat16 for TPU; weights, softmax and loss are float32
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    learning_rate: float = 1e-3  # Higher LR for small model
    warmup_steps: int = 100  # Short warmup
    total_steps: int = 5000  # The schedule's length, whatever num_steps is: a shorter run is the beginning of this one
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # Gradient clipping
    beta1: float = 0.9
    beta2: float = 0.95
    batch_size_per_device: int = 8  # Sequences: 64 a step on 8 devices
    seed: int = 0

    def __post_init__(self):
        known = {name: jnp.dtype(name) for name in ("bfloat16", "float16", "float32")}
        name = getattr(self.dtype, "__name__", str(self.dtype))  # "bfloat16" and jnp.bfloat16 are the same setting
        require(name in known, f"dtype={self.dtype!r}: it must be one of {', '.join(known)}")
        object.__setattr__(self, "dtype", known[name])
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 1 if field.type is int and field.name != "seed" else 0
            if field.type in (int, float):
                valid = isinstance(value, (int, field.type)) and value >= least
                require(valid, f"{field.name}={value!r}: it must be a number, {field.type.__name__}, at least {least}")
        fits = self.warmup_steps < self.total_steps
        require(fits, f"warmup_steps={self.warmup_steps}: it must be less than total_steps={self.total_steps}")
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim}: it must be even, because RoPE rotates pairs")
        require(self.dropout == 0, f"dropout={self.dropout}: this model has none; leave it at 0.0")


CONFIG = Config()  # what validate_pipeline() and train() use unless they are given another
TOKENIZER = "bigcode/starcoder2-3b"
DATASETS = ({"path": "bigcode/the-stack", "data_dir": "data/python"}, {"path": "codeparrot/codeparrot-clean"})
HUB_SECONDS = 5  # the Hugging Face hub is asked once and has this long to answer
LOCAL_BYTES = 20_000_000  # without the hub: this much of the machine's own Python source
CHECKPOINT_DIR = "checkpoint_10m"

# Set by validate_pipeline() and train(), for generate() in a notebook; running this cell again keeps it.
tokenizer: Any = globals().get("tokenizer")

# ============ MODEL COMPONENTS ============
# Shapes: x is [batch, seq, hidden_dim]; with heads [batch, seq, heads, head_dim].


def dense(features: int, config: Config, name: str, depth_scale: float = 1.0) -> nn.Dense:
    """A matrix without bias: float32 weights, multiplied in config.dtype."""
    init = nn.initializers.normal(0.02 * depth_scale)
    return nn.Dense(features, use_bias=False, dtype=config.dtype, kernel_init=init, name=name)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: no bias, no mean subtraction. In float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * weight).astype(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotates the pairs (i, i + head_dim / 2) of every head by angles that grow with the position.

    So a query meets a key by how far apart they are. In float32: bfloat16 cannot hold position 511.
    """

    theta: float

    def __call__(self, x: jax.Array) -> jax.Array:
        seq, half = x.shape[1], x.shape[-1] // 2
        frequency = self.theta ** -(jnp.arange(half) / half)
        angle = jnp.arange(seq)[:, None, None] * frequency  # [seq, 1, half]: the same for every head
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nn.Module):
    """Multi-query attention: num_heads query heads share a single key head and a single value head."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        batch, seq, _ = x.shape
        query = dense(config.num_heads * config.head_dim, config, "query")(x)
        query = query.reshape(batch, seq, config.num_heads, config.head_dim)
        key = dense(config.head_dim, config, "key")(x)[:, :, None]  # one head
        value = dense(config.head_dim, config, "value")(x)  # one head
        rotary = RotaryEmbedding(config.rope_theta)
        query, key = rotary(query), rotary(key)[:, :, 0]
        scores = jnp.einsum("bqhd,bsd->bhqs", query, key)  # the key head is broadcast to all query heads
        causal = jnp.tril(jnp.ones((seq, seq), bool))  # position q sees positions s <= q, never the future
        scores = jnp.where(causal, scores * config.head_dim**-0.5, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(config.dtype)
        context = jnp.einsum("bhqs,bsd->bqhd", weights, value).reshape(batch, seq, -1)
        return dense(config.hidden_dim, config, "out", depth_scale=(2 * config.num_layers) ** -0.5)(context)


class FeedForward(nn.Module):
    """SwiGLU: (silu(x W_gate) * (x W_up)) W_down, three matrices instead of two."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        gate = nn.silu(dense(config.ffn_dim, config, "gate")(x))
        up = dense(config.ffn_dim, config, "up")(x)
        return dense(config.hidden_dim, config, "down", depth_scale=(2 * config.num_layers) ** -0.5)(gate * up)


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward layer, each on a normalized input and added to what was there."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        x = x + Attention(config, name="attention")(RMSNorm(config.norm_eps, name="attention_norm")(x))
        return x + FeedForward(config, name="feed_forward")(RMSNorm(config.norm_eps, name="feed_forward_norm")(x))


class PythonCodeModel(nn.Module):
    """Tokens [batch, seq] -> float32 logits [batch, seq, vocab_size]; with `only`, those of that position alone."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, only: jax.Array | None = None) -> jax.Array:
        config = self.config
        shape = (config.vocab_size, config.hidden_dim)
        embedding = self.param("embedding", nn.initializers.normal(0.02), shape)
        x = jnp.take(embedding, tokens, axis=0).astype(config.dtype)
        for layer in range(config.num_layers):
            x = TransformerBlock(config, name=f"block_{layer}")(x)
        x = RMSNorm(config.norm_eps, name="norm")(x)
        if only is not None:
            x = jax.lax.dynamic_slice_in_dim(x, only, 1, axis=1)
        # Tied embeddings: the output projection is the input embedding, transposed. The result must be float32, for the
        # softmax; given float32, a TPU still multiplies in bfloat16 and adds up in float32.
        return x.astype(jnp.float32) @ embedding.T


# ============ TRAINING UTILITIES ============


class TrainState(struct.PyTreeNode):
    """Everything that training changes, and the config, by which compiled functions tell models apart."""

    step: jax.Array
    params: Any
    opt_state: Any
    config: Config = struct.field(pytree_node=False)


def sharding(*axes: str) -> NamedSharding:
    """All devices in one row. sharding("data") gives each an equal share of a batch, sharding() a whole copy."""
    return NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec(*axes))


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW on clipped gradients; linear warmup from 0, then a cosine down to a tenth. Norm weights are not decayed."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.total_steps, end_value=0.1 * config.learning_rate
    )

    def is_matrix(params: Any) -> Any:
        return jax.tree.map(lambda weight: weight.ndim > 1, params)

    adamw = optax.adamw(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw)


@functools.partial(jax.jit, static_argnums=0)
def create_train_state(config: Config) -> TrainState:
    """Fresh weights and optimizer state, a copy on every device; the same for the same config."""
    tokens = jnp.zeros((1, config.max_seq_len), jnp.int32)
    params = PythonCodeModel(config).init(jax.random.key(config.seed), tokens)["params"]
    state = TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config).init(params), config)
    return jax.lax.with_sharding_constraint(state, sharding())


def compute_loss(params: Any, config: Config, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy, in nats, of predicting each next token of a batch."""
    inputs, targets = batch["input_ids"][:, :-1], batch["input_ids"][:, 1:]
    logits: Any = PythonCodeModel(config).apply({"params": params}, inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    # Padding is known by the length, not by its id: pad_token is eos_token, so a mask of that id would also remove
    # every true end of file, and the model would never learn to stop.
    mask = jnp.arange(targets.shape[1]) < batch["length"][:, None] - 1
    return jnp.sum(losses * mask) / jnp.sum(mask)


@functools.partial(jax.jit, donate_argnums=0)  # donated: the new state takes the old one's memory
def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, jax.Array]:
    """One step on a batch: the new state and the loss before it. Shares of a batch and sums over devices are XLA's."""
    loss, gradients = jax.value_and_grad(compute_loss)(state.params, state.config, batch)
    updates, opt_state = make_optimizer(state.config).update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return jax.lax.with_sharding_constraint(state, sharding()), loss


def save_checkpoint(state: TrainState, tokenizer: Any, directory: str = CHECKPOINT_DIR) -> None:
    """Writes state, config and tokenizer, for load_checkpoint. Only a whole checkpoint replaces the one before."""
    folder = pathlib.Path(directory).absolute()
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    ours = not folder.exists() or (folder / "state.msgpack").is_file()
    require(ours, f"{folder} is there and is no checkpoint; give a directory of its own, such as {folder / 'model'}")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    tokenizer.save_pretrained(partial / "tokenizer")
    config = dataclasses.asdict(state.config) | {"dtype": state.config.dtype.name}
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    (partial / "state.msgpack").write_bytes(serialization.to_bytes(jax.device_get(state)))
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(directory: str = CHECKPOINT_DIR) -> tuple[TrainState, Any]:
    """(state, tokenizer) of a saved run, for generate(state, tokenizer, ...) or more calls of train_step."""
    from transformers import AutoTokenizer

    folder = pathlib.Path(directory)
    config = Config(**json.loads((folder / "config.json").read_text()))
    shapes = jax.eval_shape(lambda: create_train_state(config))
    state = serialization.from_bytes(shapes, (folder / "state.msgpack").read_bytes())
    return jax.device_put(state, sharding()), AutoTokenizer.from_pretrained(str(folder / "tokenizer"))


# ============ DATA LOADING ============


@functools.cache
def hub_problem() -> str:
    """Why the Hugging Face hub cannot be used, or "". Asked once: its own library retries for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url = f"{constants.ENDPOINT}/{TOKENIZER}/resolve/main/tokenizer_config.json"
    answers = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=HUB_SECONDS).close()
            answers.append("")
        except Exception as error:
            answers.append(f"{url}: {error}")

    thread = threading.Thread(target=ask, daemon=True)  # because the look-up of the name knows no timeout
    thread.start()
    thread.join(HUB_SECONDS)
    return answers[0] if answers else f"{url}: no answer in {HUB_SECONDS} seconds"


def is_usable(text: str) -> bool:
    """The filter that every training text passes."""
    return 100 < len(text) < 50000


@functools.cache
def local_texts() -> list[str]:
    """Usable Python files of this interpreter and its packages, each once, in the random order of their hashes."""
    texts: dict[bytes, str] = {}
    size = 0
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(pathlib.Path(folder).rglob("*.py")):
            if size > LOCAL_BYTES:
                break
            with contextlib.suppress(OSError, UnicodeDecodeError):
                text = path.read_text(encoding="utf-8")
                if is_usable(text):
                    texts[hashlib.sha256(text.encode()).digest()] = text
                    size += len(text)
    require(bool(texts), "this Python installation has no source files to train on")
    return [texts[digest] for digest in sorted(texts)]


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of at most vocab_size tokens: every text can be encoded, and comes back exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end, byte_level = "<|endoftext|>", pre_tokenizers.ByteLevel
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = byte_level(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[end], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, clean_up_tokenization_spaces=False)


@functools.cache
def load_tokenizer(vocab_size: int) -> Any:
    """StarCoder2's tokenizer or, where the hub does not give it, one trained on the files of this machine."""
    from transformers import AutoTokenizer

    problem, loaded = hub_problem(), None
    if not problem:
        try:
            loaded = AutoTokenizer.from_pretrained(TOKENIZER)
        except Exception as error:
            problem = f"{TOKENIZER}: {error}"
    if loaded is None:
        print(f"!!! NO TOKENIZER FROM THE HUGGING FACE HUB: {problem}")
        print("!!! Training one on the Python files of this machine instead, in about 10 seconds.")
        loaded = train_tokenizer(local_texts(), vocab_size)
    require(len(loaded) <= vocab_size, f"vocab_size={vocab_size} is less than the tokenizer's {len(loaded)} tokens")
    loaded.pad_token = loaded.eos_token
    return loaded


@functools.cache
def find_rows() -> Any:
    """What to iterate over, again and again, for rows with a "content": the first source that gives any."""
    problem = hub_problem()
    for source in () if problem else DATASETS:
        try:
            import datasets

            rows = datasets.load_dataset(**source, split="train", streaming=True)
            require(any(is_usable(row["content"]) for row in rows), "it has no usable file")
            print(f"Data: {source['path']}, streaming")
            return rows
        except Exception as error:
            problem = f"{source['path']}: {type(error).__name__}: {error}"
            print(f"! Skipped: {problem}")
    texts = local_texts()
    print(f"!!! NO DATA FROM THE HUGGING FACE HUB: {problem}")
    print(f"!!! Training on {len(texts):,} Python files of this machine instead: a test of the pipeline, no more.")
    return [{"content": text} for text in texts]


def load_data(config: Config, tokenizer: Any) -> Iterator[dict[str, jax.Array]]:
    """Batches without end: {'input_ids': [batch, max_seq_len + 1], 'length': [batch]}, every device its share of rows.

    A row is the beginning of one file; after it, if there is room, EOS and padding.
    """
    batch_size, width = config.batch_size_per_device * jax.device_count(), config.max_seq_len + 1
    rows = itertools.chain.from_iterable(itertools.repeat(find_rows()))
    limit = 16 * width  # characters: of a longer file the rest is not tokenized, which halves the work
    texts = (row["content"][:limit] for row in rows if is_usable(row["content"]))
    options = {"truncation": True, "max_length": width, "add_special_tokens": False}
    while True:
        # Split special tokens: a file in which "<|endoftext|>" is written does not end there.
        chosen = list(itertools.islice(texts, batch_size))
        encoded = tokenizer(chosen, split_special_tokens=True, **options)["input_ids"]
        ends = [[] if len(text) == limit else [tokenizer.eos_token_id] for text in chosen]
        documents = [[*ids, *end][:width] for ids, end in zip(encoded, ends, strict=True)]
        tokens = np.full((batch_size, width), tokenizer.pad_token_id, np.int32)
        for row, ids in zip(tokens, documents, strict=True):
            row[: len(ids)] = ids
        length = np.array([len(ids) for ids in documents], np.int32)
        yield jax.device_put({"input_ids": tokens, "length": length}, sharding("data"))


# ============ GENERATION ============


@functools.partial(jax.jit, static_argnums=1)  # every other argument may change without compiling anew
def sample_token(params, config, tokens, last, num_tokens, temperature, seed, count):
    """The token that follows position `last` of tokens [max_seq_len]; the most likely one where temperature is 0."""
    logits: Any = PythonCodeModel(config).apply({"params": params}, tokens[None], last)
    logits = jnp.where(jnp.arange(config.vocab_size) < num_tokens, logits[0, 0], -jnp.inf)
    key = jax.random.fold_in(jax.random.key(seed), count)
    sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, sampled, jnp.argmax(logits))


def generate(
    state: TrainState, tokenizer: Any, prompt: str, max_tokens: int = 50, temperature: float = 0.8, seed: int = 0
) -> str:
    """The prompt and its continuation, up to EOS or max_tokens. The model sees the last max_seq_len tokens."""
    require(temperature >= 0, f"temperature={temperature}: it must be 0 (the most likely token) or more")
    require(tokenizer is not None, "there is no tokenizer yet; validate_pipeline() or load_checkpoint() gives one")
    config = state.config
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    start = len(ids)
    for count in range(max_tokens):
        window = ids[-config.max_seq_len :]
        # A buffer of one fixed length, so that one compiled program serves every prompt and every token. What stands
        # after the last token is not seen by it: attention is causal.
        tokens = np.zeros(config.max_seq_len, np.int32)
        tokens[: len(window)] = window
        given = (tokens, len(window) - 1, len(tokenizer), float(temperature), seed, count)
        token = int(sample_token(state.params, config, *given))
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return prompt + tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)


# ============ VALIDATION ============


@functools.cache  # once, at startup
def print_device_info() -> None:
    """The JAX version and the devices."""
    print(f"JAX version: {jax.__version__}\nDevices: {jax.devices()}\nDevice count: {jax.device_count()}")


def count_parameters(params: Any) -> int:
    """How many numbers a tree of weights holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@contextlib.contextmanager
def check(failure: str, cure: str) -> Iterator[None]:
    """Runs a `with` block; if it fails, prints what failed, the cause and the cure, and stops."""
    try:
        yield
    except Exception as error:
        print(f"✗ {failure}\n  Cause: {type(error).__name__}: {error}\n  Cure: {cure}")
        raise RuntimeError(f"validate_pipeline stopped: {failure}") from error


def validate_pipeline(config: Config = CONFIG) -> None:
    """Tries every part of the pipeline once, before any time is spent on training.

    Raises:
        RuntimeError: a check failed; what failed, the cause and the cure are printed.
    """
    global tokenizer
    upgrade = 'pip install -U "jax[tpu]" flax optax, then restart the session: until then the old one stays loaded.'
    with check("JAX is too old", upgrade):
        require(jax.__version_info__ >= (0, 7, 2), f"JAX {jax.__version__} is older than 0.7.2")
    restart = (
        "choose a TPU as the accelerator and restart the session; on Kaggle, stop the session and start another. "
        "Only one process can use a TPU, so stop others."
    )
    with check("Devices are not available", restart):
        print_device_info()
        on_kaggle = "KAGGLE_KERNEL_RUN_TYPE" in os.environ and jax.default_backend() == "tpu"
        require(not on_kaggle or jax.device_count() == 8, f"Kaggle gave {jax.device_count()} of the 8 TPU cores")
        if jax.default_backend() == "tpu":
            print("✓ TPU available")
        else:
            print(f"! No TPU: this is a {jax.default_backend()}, which works, but on a CPU a step takes seconds")

    access = "accept its conditions on its page, and log in with huggingface_hub.login()"
    offline = "set HF_HUB_OFFLINE=1 before the first cell to use the files of this machine"
    with check("Tokenizer does not work", f"{access}; or pip install -U transformers; or {offline}."):
        tokenizer = load_tokenizer(config.vocab_size)
        text = "def add(a, b):\n    return [a , b]\n"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        require(back == text, f"{text!r} came back as {back!r}")
        print("✓ Tokenizer works")

    with check("Data does not load", f"{access}; or pip install -U datasets; or {offline}."):
        batch = next(load_data(config, tokenizer))
        rows = config.batch_size_per_device * jax.device_count()
        shape, largest = batch["input_ids"].shape, int(jnp.max(batch["input_ids"]))
        require(shape == (rows, config.max_seq_len + 1), f"input_ids have the shape {shape}")
        require(largest < config.vocab_size, f"token {largest} is not below vocab_size={config.vocab_size}")
        print("✓ Data loads")

    memory = "if memory is short, lower batch_size_per_device and stop other programs on the device"
    with check("Model cannot be initialized", f"look for a wrong size in the config; {memory}."):
        state = create_train_state(config)
        print(f"✓ Model initialized: {count_parameters(state.params):,} params")

    with check("Forward pass does not work", f"look at the model components; {memory}."):
        logits = jax.jit(PythonCodeModel(config).apply)({"params": state.params}, batch["input_ids"][:, :-1])
        expected = (rows, config.max_seq_len, config.vocab_size)
        require(logits.shape == expected, f"logits have the shape {logits.shape} and not {expected}")
        del logits
        print("✓ Forward pass works")

    with check("Loss is wrong", f"look at compute_loss and the initial weights; {memory}."):
        loss = float(jax.jit(compute_loss, static_argnums=1)(state.params, config, batch))
        guess = math.log(config.vocab_size)
        require(abs(loss - guess) < 1, f"it is {loss}; a fresh model guesses, with loss ln(vocab_size) = {guess:.4f}")
        print(f"✓ Loss computes: {loss:.4f}")

    with check("Training step does not work", f"look at train_step and make_optimizer; {memory}."):
        state, loss = train_step(state, batch)
        require(int(state.step) == 1, f"after one step the state counts {state.step}")
        print("✓ Training step works")

    with check("Loss or weights are not finite", "try dtype=jnp.float32, a lower learning_rate or another device."):
        require(math.isfinite(loss), f"the loss of the training step is {loss}")
        finite = jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), (state.params, state.opt_state))
        require(all(jax.tree.leaves(finite)), "the weights or the optimizer's moments hold NaN or infinity")
        print("✓ Loss is not NaN")


# ============ MAIN TRAINING ============


def train(config: Config = CONFIG, num_steps: int = 5000, log_every: int = 100) -> TrainState:
    """Trains a fresh model, prints the loss every log_every steps, saves to CHECKPOINT_DIR; returns the last state."""
    global tokenizer
    require(num_steps > 0 and log_every > 0, f"num_steps={num_steps} and log_every={log_every} must be above 0")
    print_device_info()
    tokenizer = load_tokenizer(config.vocab_size)
    state = create_train_state(config)
    total, embedding = count_parameters(state.params), state.params["embedding"].size
    others = f"{total - embedding:,} in the {config.num_layers} blocks and the last norm"
    print(f"Model parameters: {total:,}\n  {embedding:,} in the tied embedding, {others}")
    batches = load_data(config, tokenizer)
    started = time.perf_counter()
    try:
        for step in tqdm(range(1, num_steps + 1), desc="Training", unit="step"):
            state, loss = train_step(state, next(batches))  # returns at once: the device works while the host reads on
            if step % log_every == 0 or step == num_steps:
                tqdm.write(f"Step {step}, Loss: {loss:.4f}")
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss}; nothing was saved. Try a lower learning_rate")
    except (Exception, KeyboardInterrupt) as error:  # a data stream that breaks off, or the notebook's stop button
        if not state.step.is_deleted() and int(state.step) > 0 and math.isfinite(loss):
            save_checkpoint(state, tokenizer)
            print(f"Stopped after step {state.step} ({type(error).__name__}); saved: {CHECKPOINT_DIR}")
        raise
    seconds = time.perf_counter() - started
    tokens = num_steps * config.batch_size_per_device * jax.device_count() * config.max_seq_len
    print(f"Trained {num_steps:,} steps in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s, compilation included")
    save_checkpoint(state, tokenizer)
    print(f"Checkpoint saved: {CHECKPOINT_DIR}; state, tokenizer = load_checkpoint() loads it")
    return state


# ============ ENTRY POINT ============


def main(arguments: list[str]) -> None:
    """Validates, trains and generates; arguments are settings, such as num_steps=100."""
    settings: dict[str, Any] = {"num_steps": 5000, "log_every": 100}
    known = [*settings, *(field.name for field in dataclasses.fields(Config))]
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in known or not value:
            sys.exit(f"{argument!r} is no setting; write name=value with one of the names {', '.join(known)}")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value  # such as dtype=float32
    num_steps, log_every = settings.pop("num_steps"), settings.pop("log_every")
    for name, value in {"num_steps": num_steps, "log_every": log_every}.items():
        if not isinstance(value, int) or value < 1:
            sys.exit(f"{name}={value}: it must be a whole number above 0")
    config = Config(**settings)
    validate_pipeline(config)
    state = train(config, num_steps, log_every)
    prompt = "def hello():"
    print(f"Prompt: {prompt}")
    print(f"Generated: {generate(state, tokenizer, prompt)}")


if __name__ == "__main__" and "get_ipython" not in globals():  # a notebook's cells call the functions themselves
    main(sys.argv[1:])
