"""What may change between the launches of one run: whatever does not change what is learned.

Everything else, keys added later too, is refused with a diff unless allow_config_change names it.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from MaxText import config_files

# The keys that give the parameters their shapes and their meaning: a checkpoint fits only if they are the same.
MODEL_KEYS = (
    "base_emb_dim",
    "base_num_decoder_layers",
    "base_num_query_heads",
    "base_num_kv_heads",
    "head_dim",
    "base_mlp_dim",
    "attention_type",
    "vocab_size",
    "vocab_padding",
    "final_logits_soft_cap",
    "logits_via_embedding",
    "mtp_num_layers",
    "mtp_transformer_block",
    "use_qk_norm",
    "normalization_layer_epsilon",
    "rope_max_timescale",
    "weight_dtype",
)
# Those that the optimizer's state depends on besides.
STATE_KEYS = (*MODEL_KEYS, "opt_type", "mu_dtype", "skip_step_on_spikes", "skip_step_interval")

# Free to change. What decides the batches is compared apart, as the data's position: a batch of 4 on each of 8 devices
# is one of 8 on each of 4, and the same files may lie elsewhere.
_FREE_KEYS = """
    run_name base_output_directory steps log_period max_run_hours enable_tensorboard allow_config_change
    enable_checkpointing async_checkpointing checkpoint_period max_num_checkpoints_to_keep checkpoint_every_epoch
    checkpoint_staging_directory load_full_state_path load_parameters_path num_vocab_tiling attention remat_policy
    decoder_layer_input query_proj key_proj value_proj context out_proj mlpwi_0 mlpwi_1 mlpwo sharding_tolerance
    dataset_type grain_train_files grain_eval_files data_cache_directory embedded_corpus_bytes tokenizer_path
    per_device_batch_size gradient_accumulation_steps max_target_length enable_data_shuffling data_shuffle_seed
    num_epoch grain_worker_count max_skipped_steps_in_a_row eval_interval eval_steps
    eval_per_device_batch_size jax_cache_dir profiler skip_first_n_steps_for_profiler profiler_steps
    peak_tflops_per_device compile_topology compile_xla_flags compiled_trainstep_file hang_timeout_minutes
    sdc_check_interval initializer_range residual_init_scale
"""
_FREE_PREFIXES = ("ici_", "dcn_")


class Mismatch(ValueError):
    """A checkpoint that is whole but does not belong to this run."""


def check_same(
    directory: Path,
    saved: Mapping[str, Any],
    wanted: Mapping[str, Any],
    keys: Collection[str],
    what: str,
    allowed: Collection[str] = (),
) -> None:
    """Refuses a checkpoint that was made with other values of these keys.

    Raises:
        Mismatch: it was; with the difference, and what to do.
    """
    defaults = {key.name: key.default for key in config_files.manual().values()}
    saved = defaults | dict(saved)  # a key that is younger than the checkpoint had no other meaning than its default
    different = [key for key in keys if key not in allowed and saved.get(key) != wanted[key]]
    if not different:
        return
    cure = "use the values it was made with, or another run_name for a new run"
    if what != "model":
        cure += f"; or, if the change is meant, allow_config_change={','.join(different)}"
    raise Mismatch(
        f"checkpoint {directory} was made with another {what}:\n  "
        + "\n  ".join(f"{key}: {saved.get(key)!r} there, {wanted[key]!r} here" for key in different)
        + f"\n{cure}; nothing was changed"
    )


def training_keys(wanted: Mapping[str, Any]) -> list[str]:
    """The keys that change what is learned, those of the model and the data's position aside."""
    aside = {*_FREE_KEYS.split(), *STATE_KEYS}
    return [key for key in wanted if key not in aside and not key.startswith(_FREE_PREFIXES)]


def described(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """All that differs, in one line; empty where nothing does."""
    differ = [key for key in wanted if key in saved and saved[key] != wanted[key] and key != "allow_config_change"]
    return ", ".join(f"{key} {saved[key]!r} -> {wanted[key]!r}" for key in differ)
