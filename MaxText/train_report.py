"""What a run says in words: its opening, its progress and its closing summary."""

import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxText import flops, hardware, models
from MaxText.input_pipeline import tokenizer
from MaxText.input_pipeline.loader import Datasets
from MaxText.kernels import attention
from MaxText.train_state import TrainState


class Console:
    """Prints lines; on a terminal keeps a progress bar with an ETA below them."""

    def __init__(self, quiet: bool = False):
        self._quiet = quiet  # as all processes but the first
        self._bar: Any = None

    def emit(self, line: str) -> None:
        """Prints one line, above the bar where there is one."""
        if self._quiet:
            return
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line)

    def start_bar(self, done: int, total: int) -> None:
        """Shows the bar, if someone is looking."""
        if not self._quiet and sys.stderr.isatty() and sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1)

    def step(self, loss: float) -> None:
        """One step more."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def model_flops_per_token(config: FrozenConfigDict) -> int:
    """Training FLOPs of one token of the config's model."""
    return flops.flops_per_token(
        dim=config.base_emb_dim,
        num_layers=config.base_num_decoder_layers,
        num_query_heads=config.base_num_query_heads,
        num_kv_heads=config.base_num_kv_heads,
        head_dim=config.head_dim,
        mlp_dim=config.base_mlp_dim,
        vocab_size=config.vocab_size,
        length=config.max_target_length,
        attention_type=config.attention_type,
        mtp_num_layers=config.mtp_num_layers,
        mtp_transformer_block=config.mtp_transformer_block,
    )


def opening(config: FrozenConfigDict, mesh: jax.sharding.Mesh, abstract: TrainState, tokens_per_step: int) -> list[str]:
    """What the run is going to be, before anything is compiled."""
    devices = mesh.devices.flatten()
    per_step = model_flops_per_token(config) * tokens_per_step
    layer = models.ATTENTION_TYPES[config.attention_type]
    query, key, (heads, width) = layer.shapes(config.base_num_query_heads, config.base_num_kv_heads, config.head_dim)
    shape = (config.max_target_length, math.prod(query) // heads, math.prod(key[:-1]), config.head_dim, width)
    with jax.set_mesh(mesh):
        serves = attention.serving(config.attention, shape, config.dtype)
    return [
        f"JAX version: {jax.__version__}",
        f"Devices: {_shortened([str(device) for device in devices])}",
        f"Device count: {devices.size} ({devices[0].device_kind}, {jax.process_count()} process(es))",
        f"Attention: {serves} (attention={config.attention})",
        "Mesh: " + " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        f"Model parameters: {flops.count_parameters(abstract.params)}",
        f"Tokens per step: {tokens_per_step:,} ({tokens_per_step // config.max_target_length} sequences of "
        f"{config.max_target_length}); model FLOPs per step: {per_step:.3e}",
        _expected_loss(config),
        f"Memory per device, by arithmetic: {_mib(_device_bytes(abstract.params))} parameters + "
        f"{_mib(_device_bytes(abstract.opt_state))} optimizer state + {_mib(_device_bytes(abstract.params))} "
        "gradients, and activations",
    ]


def _expected_loss(config: FrozenConfigDict) -> str:
    size = tokenizer.num_token_ids(config)
    line = f"Expected loss at initialization: ln({size:,}) = {math.log(size):.3f}"
    if config.mtp_num_layers:
        both = (1 + config.mtp_loss_scaling_factor) * math.log(size)
        line += f" for the next token, {both:.3f} with multi-token prediction"
    if config.logits_via_embedding and config.residual_init_scale == 0:
        # The state is the token's own embedding, normalized: its own logit is D times the standard deviation.
        stddev, dim = config.initializer_range, config.base_emb_dim
        total = (size - 1) * math.exp(stddev**2 * dim / 2) + math.exp(stddev * dim)
        line += (
            f"; up to {math.log(total):.3f}, as layers that add nothing yet leave each token its own likeliest next one"
        )
    return line


def compiled_memory(compiled: jax.stages.Compiled) -> str:
    """What the compiler says the step needs on each device."""
    stats = compiled.memory_analysis()
    if stats is None:
        return "Memory per device, by the compiler: not reported by this backend"
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return (
        f"Memory per device, by the compiler: {_mib(held)} held + {_mib(stats.temp_size_in_bytes)} temporary = "
        f"{_mib(held + stats.temp_size_in_bytes)} estimated peak"
    )


def peak_flops(config: FrozenConfigDict, devices: Sequence[jax.Device]) -> tuple[float, str]:
    """FLOP/s of one device that MFU is measured against, and where the figure comes from."""
    if config.peak_tflops_per_device > 0:
        return config.peak_tflops_per_device * 1e12, "peak_tflops_per_device"
    device = devices[0]
    chip = hardware.find_chip(device.device_kind)
    if chip is not None:
        return chip.peak_flops, chip.source
    rate = hardware.measure_matmul_flops({config.dtype, "float32"}) / len(devices)
    return rate, f"the best matrix product measured here, as no figure is published for {device.device_kind!r}"


def closing(seconds: Mapping[str, float], steps: int, tokens: int, last: Mapping[str, float]) -> list[str]:
    """What the launch did: steps, tokens, where the time went, and how good the model is."""
    wall = sum(seconds.values())
    split = ", ".join(f"{name} {spent:.1f} s ({spent / wall:.0%})" for name, spent in seconds.items())
    lines = [f"Trained {steps:,} steps, {tokens:,} tokens in {wall:.1f} s: {split}"]
    if "learning/lm_loss" in last:
        lines.append(f"Final training loss of the next token: {last['learning/lm_loss']:.4f}")
    if "eval/avg_loss" in last:
        bits = last.get("eval/bits_per_byte")
        lines.append(
            f"Final held-out loss: {last['eval/avg_loss']:.4f}, perplexity: {last['eval/avg_perplexity']:.3f}"
            + ("" if bits is None else f", bits per byte: {bits:.4f}")
        )
    return lines


def goodput_line(seconds: Mapping[str, float]) -> str:
    """The productive share of the time since the run's first launch, and where the rest went."""
    wall = sum(seconds.values())
    split = ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items() if name != "step")
    return f"Goodput: {seconds['step'] / wall:.1%} of the {wall:.1f} s since the first launch were steps; {split}"


def git_commit(directory: str) -> str:
    """The commit of the code, with `-dirty` where it was changed; `unknown` outside a repository."""
    command = ["git", "-C", directory, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def run_info(config: FrozenConfigDict, data: Datasets, tokens_per_step: int, directory: str) -> dict[str, Any]:
    """What is saved beside the weights: the resolved config, the data, the commit, versions and compiler flags."""
    return {
        "config": config.to_dict(),
        "data": data.description.removeprefix("DATA: "),
        "tokenizer": data.tokenizer_path,
        "tokens_per_step": tokens_per_step,
        "git_commit": git_commit(directory),
        "jax_version": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", ""),
    }


def _device_bytes(tree: Any) -> int:
    """Bytes of one device's share."""
    shares = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * size for shape, size in shares)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _shortened(names: list[str]) -> str:
    return "[" + ", ".join(names if len(names) <= 8 else [*names[:4], "...", names[-1]]) + "]"
