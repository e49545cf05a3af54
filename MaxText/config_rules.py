"""The rules a configuration must obey beyond its types: ranges of numbers, and keys that must agree with each other.

In: plain values by key. Out: problems in words, each with what was given, the rule and the fix. Nothing is raised here,
because the user should see every problem at once. Rules that need the device count wait for `mesh_problems`.
"""

import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from MaxText import config_generation_rules

Values = Mapping[str, Any]

AUTO = "auto"  # the value of a numeric key that is left to arithmetic; see schedule_plan.py
MESH_KEYS = ("ici_data_parallelism", "ici_fsdp_parallelism", "ici_tensor_parallelism")
SLICE_KEYS = ("dcn_data_parallelism", "dcn_fsdp_parallelism")
REMAT_KEYS = ("decoder_layer_input", "query_proj", "key_proj", "value_proj", "context", "out_proj")
REMAT_KEYS += ("mlpwi_0", "mlpwi_1", "mlpwo")

# Every number in base.yml is in exactly one of these rows: the rule in words, the rule, the keys that obey it.
LIMITS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        """steps log_period checkpoint_period max_num_checkpoints_to_keep base_emb_dim base_num_decoder_layers
        dcn_data_parallelism dcn_fsdp_parallelism
        base_num_query_heads base_num_kv_heads head_dim base_mlp_dim vocab_size rope_max_timescale num_vocab_tiling
        rope_factor original_max_position_embeddings beta_fast
        embedded_corpus_bytes per_device_batch_size gradient_accumulation_steps max_target_length
        eval_per_device_batch_size profiler_steps max_skipped_steps_in_a_row
        compile_topology_num_slices max_tokens num_samples best_of decode_rows infilling_problems
        serve_max_queue""",
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        """z_loss_multiplier vocab_padding final_logits_soft_cap mtp_num_layers mtp_loss_scaling_factor
        mtp_loss_scaling_factor_final grain_worker_count adam_weight_decay gradient_clipping_threshold
        prepare_workers held_out_one_in skip_first_n_steps_for_profiler peak_tflops_per_device max_run_hours
        hang_timeout_minutes sdc_check_interval temperature top_k speculative_tokens""",
    ),
    ("from 0 to 2147483647", lambda value: 0 <= value < 2**31, "init_weights_seed data_shuffle_seed sampling_seed"),
    ("at least 2", lambda value: value >= 2, "skip_step_interval"),
    (
        "greater than 0",
        lambda value: value > 0,
        "learning_rate adam_eps normalization_layer_epsilon initializer_range beta_slow skip_step_scaling_factor",
    ),
    (
        "-1 or at least 1",
        lambda value: value == -1 or value >= 1,
        " ".join(MESH_KEYS) + " num_epoch eval_interval eval_steps learning_rate_schedule_steps branch_decay_from",
    ),
    ("-1 or at least 0", lambda value: value == -1 or value >= 0, "residual_init_scale"),
    (
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
        """sharding_tolerance warmup_steps_fraction wsd_decay_steps_fraction learning_rate_final_fraction
        fim_rate fim_spm_rate near_duplicate_threshold min_p""",
    ),
    ("greater than 0 and at most 1", lambda value: 0 < value <= 1, "top_p"),
    ("from 0 to 65535", lambda value: 0 <= value < 2**16, "serve_port"),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, "adam_b1 adam_b2 muon_beta dropout_rate"),
)


def out_of_range(values: Values) -> dict[str, str]:
    """The keys whose number is outside its range, each with the range in words."""
    return {
        key: rule
        for rule, holds, keys in LIMITS
        for key in keys.split()
        if values[key] != AUTO and not holds(values[key])
    }


def contradictions(values: Values, defaults: Values, ignore: Collection[str]) -> list[str]:
    """The rules between keys that do not hold, in words.

    Args:
      ignore: keys already known to be wrong; rules that depend on them are not applied.
    """
    return [problem for keys, rule in _RULES if not set(keys) & set(ignore) for problem in rule(values, defaults)]


def slices(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
    """Slices along data, fsdp and tensor; tensor parallelism never leaves a slice."""
    return (*(config[key] for key in SLICE_KEYS), 1)


def mesh_problems(config: ml_collections.ConfigDict, num_devices: int) -> list[str]:
    """Why the mesh of a valid config does not fit num_devices devices, in words; empty when it does."""
    num_slices = math.prod(slices(config))
    if num_slices > 1:
        given = " x ".join(f"{key}={config[key]}" for key in SLICE_KEYS)
        if num_devices % num_slices:
            return [f"{given} slices do not divide the {num_devices} devices; use as many as there are slices"]
        whole_fsdp = config.dcn_fsdp_parallelism * max(config.ici_fsdp_parallelism, 1)
        if config.base_emb_dim % whole_fsdp:
            return [
                f"fsdp is {whole_fsdp} over all slices, which does not divide base_emb_dim={config.base_emb_dim}; "
                "use dcn_fsdp_parallelism=1"
            ]
        num_devices //= num_slices
    dims = {key: config[key] for key in (*_FSDP_KEYS, *_TENSOR_KEYS)}
    sizes = {key: config[key] for key in MESH_KEYS}
    given = math.prod(size for size in sizes.values() if size != -1)
    product = " x ".join(f"{key}={size}" for key, size in sizes.items() if size != -1) + f" = {given}"
    filled = [key for key in MESH_KEYS if sizes[key] == -1]
    if filled and num_devices % given:
        legal = _one_of(_divisors(num_devices, num_devices))
        return [
            f"{product} does not divide the {num_devices} devices, the rest being for {filled[0]}=-1; make it {legal}"
        ]
    if filled:
        return _uneven(dims, {**sizes, filled[0]: num_devices // given}, num_devices)
    if given == num_devices:
        return _uneven(dims, sizes, num_devices)
    fixes = []
    for key in MESH_KEYS:
        others = given // sizes[key]
        if num_devices % others == 0 and not _uneven(dims, {**sizes, key: num_devices // others}, num_devices):
            fixes.append(f"{key}={num_devices // others}")
    everything_data = " ".join(f"{key}={size}" for key, size in zip(MESH_KEYS, (-1, 1, 1), strict=True))
    return [f"{product}, but there are {num_devices} devices; use {_one_of(fixes or [everything_data])}"]


def _uneven(dims: Values, sizes: Values, num_devices: int) -> list[str]:
    """The problems of model dimensions that these mesh sizes, without -1, do not divide."""
    problems = [*_fsdp({**dims, **sizes}, num_devices), *_tensor({**dims, **sizes}, num_devices)]
    return [f"on {num_devices} devices, {problem}" for problem in problems]


def _one_of(options: Collection[object]) -> str:
    *first, last = map(str, options)
    return f"{', '.join(first)} or {last}" if first else last


def _divisors(number: int, at_most: int) -> list[int]:
    return [n for n in range(1, min(number, at_most) + 1) if number % n == 0]


def _divides(values: Values, key: str, targets: Collection[str], num_devices: int = 0) -> Iterator[str]:
    """The problem, if any, of values[key] not dividing the targets; where num_devices is known, the fix divides it."""
    size = values[key]
    failing = [f"{target}={values[target]}" for target in targets if size != -1 and values[target] % size]
    if failing:
        common = math.gcd(num_devices, *(values[target] for target in targets))
        legal = _divisors(common, at_most=min(max(8, size), 1024))
        yield f"{key}={size} does not divide {' and '.join(failing)}; use {_one_of(legal)}"


def _fsdp(values: Values, num_devices: int = 0) -> Iterator[str]:
    yield from _divides(values, "ici_fsdp_parallelism", ["base_emb_dim"], num_devices)


def _tensor(values: Values, num_devices: int = 0) -> Iterator[str]:
    heads = {key: values[key] for key in _HEAD_KEYS}
    if values["attention_type"] == "differential":  # a pair of heads stays on one device
        heads = {f"{key} / 2": size // 2 for key, size in heads.items()}
    # A single K/V head (MQA) is replicated over the tensor axis on purpose.
    targets = [key for key, size in heads.items() if size > 1 or "kv" not in key]
    targets += ["base_mlp_dim", "vocab_size"]
    yield from _divides({**values, **heads}, "ici_tensor_parallelism", targets, num_devices)


def _pairs_of_heads(values: Values, _: Values) -> Iterator[str]:
    odd = [key for key in _HEAD_KEYS if values[key] % 2]
    if odd and values["attention_type"] == "differential":
        given = " and ".join(f"{key}={values[key]}" for key in odd)
        fix = " ".join(f"{key}={values[key] + 1}" for key in odd)
        yield f"{given}: attention_type=differential takes heads in pairs; use even numbers, such as {fix}"


def _vocab_padding(values: Values, _: Values) -> Iterator[str]:
    padding, size = values["vocab_padding"], values["vocab_size"]
    if padding >= size:
        yield f"vocab_padding={padding} leaves none of vocab_size={size} ids; it counts the ids that no token has"


def _yarn(values: Values, _: Values) -> Iterator[str]:
    factor, trained, length = (
        values[key] for key in ("rope_factor", "original_max_position_embeddings", "max_target_length")
    )
    if factor != 1 and length <= trained:
        yield (
            f"rope_factor={factor} with max_target_length={length}: nothing lies beyond the trained length, "
            f"original_max_position_embeddings={trained}; use rope_factor=1, or give the length trained before"
        )
    elif factor != 1 and factor * trained < length:
        yield (
            f"rope_factor={factor} stretches original_max_position_embeddings={trained} to {factor * trained:,.0f}, "
            f"less than max_target_length={length}; use rope_factor={-(-length // trained)}"
        )
    if values["beta_fast"] <= values["beta_slow"]:
        given = f"beta_fast={values['beta_fast']} and beta_slow={values['beta_slow']}"
        yield f"{given}: fast frequencies make more turns than slow ones; use beta_fast=32 beta_slow=1"


def _schedule(values: Values, _: Values) -> Iterator[str]:
    if values["lr_schedule_type"] != "wsd":
        return
    warmup, decay = values["warmup_steps_fraction"], values["wsd_decay_steps_fraction"]
    if warmup + decay > 1:
        yield (
            f"warmup_steps_fraction={warmup} and wsd_decay_steps_fraction={decay} are more than the whole schedule; "
            f"use wsd_decay_steps_fraction={1 - warmup:.3g} or less"
        )
    if values["wsd_decay_style"] == "exponential" and values["learning_rate_final_fraction"] == 0:
        yield (
            "wsd_decay_style=exponential never reaches learning_rate_final_fraction=0; use "
            "learning_rate_final_fraction=0.01 or another wsd_decay_style"
        )


def _steps_by_epochs(values: Values, _: Values) -> Iterator[str]:
    if values["steps"] == AUTO and values["num_epoch"] == -1:
        yield "steps=auto takes its number from the data, and num_epoch=-1 names no number of passes; use num_epoch=1"
    if values["steps"] == AUTO and values["dataset_type"] == "synthetic":
        yield "steps=auto takes its number from the data, and dataset_type=synthetic never ends; give steps a number"


def _branch(values: Values, _: Values) -> Iterator[str]:
    start = values["branch_decay_from"]
    if start == -1:
        return
    if values["lr_schedule_type"] != "wsd" or not values["wsd_decay_steps_fraction"] < 1:
        yield (
            f"branch_decay_from={start} with lr_schedule_type={values['lr_schedule_type']} and "
            f"wsd_decay_steps_fraction={values['wsd_decay_steps_fraction']}: only the stable phase of wsd has "
            "branches; use lr_schedule_type=wsd and a fraction below 1"
        )
    if values["load_full_state_path"] or values["load_parameters_path"]:
        yield (
            f"branch_decay_from={start} starts from this run's own checkpoint; "
            "leave load_full_state_path and load_parameters_path out"
        )


def _one_filled_axis(values: Values, _: Values) -> Iterator[str]:
    filled = [key for key in MESH_KEYS if values[key] == -1]
    if len(filled) > 1:
        yield (
            f"{' and '.join(f'{key}=-1' for key in filled)}: at most one may be -1 (filled with the devices left); "
            f"keep {filled[0]}=-1 and set {' '.join(f'{key}=1' for key in filled[1:])}"
        )


def _even_head_dim(values: Values, _: Values) -> Iterator[str]:
    size = values["head_dim"]
    if size % 2:
        yield f"head_dim={size} is odd, and RoPE rotates pairs; use head_dim={size + 1}"


def _run_name(values: Values, _: Values) -> Iterator[str]:
    name = values["run_name"]
    if not name:
        yield "run_name is not given, and it names the run's directory; add run_name=<name>, such as run_name=first_try"
    elif name in (".", "..") or name != name.strip() or not name.isprintable() or re.search(r"[/\\]", name):
        fixed = re.sub(r"[^\w.-]+", "_", name.strip()).strip("._") or "first_try"
        yield (
            f"run_name={name!r} is not a plain directory name; use run_name={fixed} "
            "(the directory above it is base_output_directory)"
        )
    elif len(os.fsencode(name)) > 255:
        yield f"run_name is {len(os.fsencode(name))} bytes long and a directory name may have 255; use a shorter one"


def _xla_flags(values: Values, _: Values) -> Iterator[str]:
    wrong = [word for word in values["compile_xla_flags"].split() if not re.fullmatch(r"(--)?\w+=\S+", word)]
    if wrong:
        yield f"compile_xla_flags: {wrong[0]!r} is not name=value; write --xla_name=value, spaces between several"


def _needs_text(values: Values, defaults: Values) -> Iterator[str]:
    for key in ("base_output_directory", "data_cache_directory"):
        if not values[key].strip():
            yield f"{key} is empty; give a directory, such as {key}={defaults[key]}"


def _one_starting_point(values: Values, _: Values) -> Iterator[str]:
    keys = ("load_full_state_path", "load_parameters_path")
    if all(values[key] for key in keys):
        given = " and ".join(f"{key}={values[key]}" for key in keys)
        yield (
            f"{given}: a run starts from one checkpoint; keep the first for weights, optimizer and data position, "
            "or the second for the weights alone"
        )


def _custom_remat(values: Values, defaults: Values) -> Iterator[str]:
    changed = [f"{key}={values[key]}" for key in REMAT_KEYS if values[key] != defaults[key]]
    if changed and values["remat_policy"] != "custom":
        yield (
            f"{', '.join(changed)} would have no effect, because remat_policy={values['remat_policy']}; "
            f"use remat_policy=custom or leave {'it' if len(changed) == 1 else 'them'} out"
        )


def _training_files(values: Values, _: Values) -> Iterator[str]:
    if values["dataset_type"] == "grain" and not values["compile_topology"]:
        yield from _manifest(values, "grain_train_files")
        if not values["grain_train_files"]:
            yield (
                "dataset_type=grain needs grain_train_files=<directory with a manifest.json>; "
                "or use dataset_type=embedded, which needs no files"
            )


def _held_out_files(values: Values, _: Values) -> Iterator[str]:
    if values["dataset_type"] == "grain" and values["eval_interval"] != -1 and not values["compile_topology"]:
        yield from _manifest(values, "grain_eval_files")
        if not values["grain_eval_files"]:
            yield (
                f"dataset_type=grain with eval_interval={values['eval_interval']} needs "
                "grain_eval_files=<directory with a manifest.json>; or use eval_interval=-1 for no evaluation"
            )


def _manifest(values: Values, key: str) -> Iterator[str]:
    """The problem, if any, of the directory of prepared data that values[key] names."""
    text = values[key]
    if not text:
        return
    parts = [part.rpartition(",")[0].strip() for part in text.split(";") if part.strip()] if "," in text else [text]
    fix = "give a directory of token blocks, such as the train/ or heldout/ that prepare_data.py makes"
    for folder in (Path(part).expanduser() for part in parts):
        if not folder.is_dir():
            yield f"{key}={text}: there is no such directory as {folder}; {fix}"
        elif not (folder / "manifest.json").is_file():
            yield f"{key}={text}: there is no {folder / 'manifest.json'}; {fix}"


_FSDP_KEYS = ("ici_fsdp_parallelism", "base_emb_dim")
_HEAD_KEYS = ("base_num_query_heads", "base_num_kv_heads")
_SCHEDULE_KEYS = ("lr_schedule_type", "warmup_steps_fraction", "wsd_decay_steps_fraction")
_SCHEDULE_KEYS += ("wsd_decay_style", "learning_rate_final_fraction")
_BRANCH_KEYS = ("branch_decay_from", "lr_schedule_type", "wsd_decay_steps_fraction")
_BRANCH_KEYS += ("load_full_state_path", "load_parameters_path")
_TENSOR_KEYS = ("ici_tensor_parallelism", "attention_type", *_HEAD_KEYS, "base_mlp_dim", "vocab_size")

# The keys a rule depends on, and the rule.
_RULES: tuple[tuple[tuple[str, ...], Callable[[Values, Values], Iterator[str]]], ...] = (
    (("run_name",), _run_name),
    (("base_output_directory", "data_cache_directory"), _needs_text),
    (("load_full_state_path", "load_parameters_path"), _one_starting_point),
    (("compile_xla_flags",), _xla_flags),
    (("head_dim",), _even_head_dim),
    *config_generation_rules.RULES,
    (
        ("base_num_kv_heads", "base_num_query_heads"),
        lambda values, _: _divides(values, "base_num_kv_heads", ["base_num_query_heads"]),
    ),
    (("attention_type", *_HEAD_KEYS), _pairs_of_heads),
    (("vocab_padding", "vocab_size"), _vocab_padding),
    (
        ("rope_factor", "original_max_position_embeddings", "max_target_length", "beta_fast", "beta_slow"),
        _yarn,
    ),
    (_SCHEDULE_KEYS, _schedule),
    (("steps", "num_epoch", "dataset_type"), _steps_by_epochs),
    (_BRANCH_KEYS, _branch),
    (
        ("num_vocab_tiling", "max_target_length"),
        lambda values, _: _divides(values, "num_vocab_tiling", ["max_target_length"]),
    ),
    (("remat_policy", *REMAT_KEYS), _custom_remat),
    (MESH_KEYS, _one_filled_axis),
    (_FSDP_KEYS, lambda values, _: _fsdp(values)),
    (_TENSOR_KEYS, lambda values, _: _tensor(values)),
    (("dataset_type", "grain_train_files", "compile_topology"), _training_files),
    (("dataset_type", "eval_interval", "grain_eval_files", "compile_topology"), _held_out_files),
)
