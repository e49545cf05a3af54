"""What the config leaves to arithmetic: the learning rate, the number of steps, and the schedule of a decay branch.

In: a config in which these may be `auto`. Out: the same config with numbers, and the arithmetic in words. It is settled
once, when the data is known and before anything is traced; everything after that sees numbers only.
"""

import math
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from MaxText.config_rules import AUTO

UNKNOWN_STEPS = 100_000  # where no data is at hand, as in compiling for another machine: a constant of the program


def settled(
    config: FrozenConfigDict, *, num_parameters: int, num_windows: int | None, global_batch_size: int
) -> tuple[FrozenConfigDict, list[str]]:
    """The config with a number for every `auto`, a branch's steps and starting point; and how they were found.

    Args:
        num_windows: sequences in one pass over the training data; None where no data is at hand.

    Raises:
        ValueError: the data is smaller than one batch, or a branch does not start in the stable phase.
    """
    values: dict[str, Any] = config.to_dict()
    lines = []
    if config.learning_rate == AUTO:
        values["learning_rate"] = learning_rate(num_parameters)
        lines.append(
            f"learning_rate=auto: 3e-4 x sqrt(1.5e9 / {num_parameters:,} parameters), from 1e-4 to 1e-3 = "
            f"{values['learning_rate']:.3e}"
        )
    if config.steps == AUTO:
        values["steps"] = UNKNOWN_STEPS if num_windows is None else config.num_epoch * num_windows // global_batch_size
        if num_windows is None:
            lines.append(f"steps=auto: the data is not at hand; {UNKNOWN_STEPS:,} stands for it")
        else:
            lines.append(
                f"steps=auto: {config.num_epoch} epochs x {num_windows:,} sequences / {global_batch_size:,} a step = "
                f"{values['steps']:,}"
            )
        if values["steps"] == 0:
            raise ValueError(
                f"steps=auto: {config.num_epoch} epochs of {num_windows:,} sequences are less than one batch of "
                f"{global_batch_size:,}; use more data, more epochs or a smaller batch"
            )
    config = FrozenConfigDict(values)
    if config.branch_decay_from != -1:
        branch, line = _branch(config)
        return FrozenConfigDict(values | branch), [*lines, line]
    return config, lines


def learning_rate(num_parameters: int) -> float:
    """The peak rate for a model of this size: smaller models bear larger steps."""
    return min(max(3e-4 * math.sqrt(1.5e9 / num_parameters), 1e-4), 1e-3)


def phases(config: FrozenConfigDict) -> tuple[int, int, int]:
    """The steps after which warm-up has ended, the decay has begun, and it has ended."""
    length = config.steps if config.learning_rate_schedule_steps == -1 else config.learning_rate_schedule_steps
    warmup = round(length * config.warmup_steps_fraction)
    if config.lr_schedule_type == "cosine":
        return warmup, warmup, length
    return warmup, length - round(length * config.wsd_decay_steps_fraction), length


def run_directory(config: FrozenConfigDict) -> Path:
    """Where the run writes; a branch has a directory of its own inside it, named by its first and last step."""
    run = Path(config.base_output_directory).expanduser() / config.run_name
    start = config.branch_decay_from
    return run if start == -1 else run / "branches" / f"{start}-{_branch_end(config)}"


def branch_start(config: FrozenConfigDict) -> Path:
    """The checkpoint of the run itself that its branch starts from."""
    run = Path(config.base_output_directory).expanduser() / config.run_name
    return run / "checkpoints" / str(config.branch_decay_from)


def epoch_ends(steps: int, global_batch_size: int, num_windows: int) -> list[int]:
    """The last whole step of each pass over the data, up to `steps`."""
    passes = ((steps + 1) * global_batch_size - 1) // num_windows
    return [epoch * num_windows // global_batch_size for epoch in range(1, passes + 1)]


def _branch_end(config: FrozenConfigDict) -> int:
    """The last step of a run of which the steps from the branch's first on are the share that decays."""
    start, fraction = config.branch_decay_from, config.wsd_decay_steps_fraction
    return start + max(1, math.floor(start * fraction / (1 - fraction) + 1e-6))  # no step more than the run itself


def _branch(config: FrozenConfigDict) -> tuple[dict[str, Any], str]:
    """The values of a run that is as long as if it had been meant to decay from here, and that in words.

    Source: Hu et al. 2024 (MiniCPM), arXiv:2404.06395, section 4.
    """
    start = config.branch_decay_from
    warmup, decay, _ = phases(config)
    if not warmup <= start <= decay:
        raise ValueError(
            f"branch_decay_from={start:,} is not in the stable phase, which lasts from step {warmup:,} to {decay:,}"
        )
    length = _branch_end(config)
    values = {
        "steps": length,
        "learning_rate_schedule_steps": length,
        "warmup_steps_fraction": warmup / length,
        "wsd_decay_steps_fraction": (length - start) / length,
        "checkpoint_every_epoch": False,
    }
    return values, f"branch_decay_from={start:,}: the last {length - start:,} steps of a run of {length:,} that decays"
