"""Our models as directories that `transformers` loads, and back.

Out: model.safetensors, config.json, the tokenizer, a model card; what Llama and DiffLlama have no place for, which is
multi-token prediction and the rows of padding ids, in extra.safetensors. Nothing is lost, so reading back is exact.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict
from safetensors import numpy as safetensors

from MaxText import hf_weights
from MaxText.input_pipeline import tokenizer
from MaxText.sharding import path_name

WEIGHTS, EXTRA = "model.safetensors", "extra.safetensors"
ARCHITECTURES = {"standard": ("llama", "LlamaForCausalLM"), "differential": ("diffllama", "DiffLlamaForCausalLM")}
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")  # a row for each token


def problems(config: FrozenConfigDict) -> list[str]:
    """Why the config's model is neither a Llama nor a DiffLlama, in words; empty when it is one."""
    found = []
    if config.attention_type not in ARCHITECTURES:
        found.append(
            f"attention_type={config.attention_type}: transformers has no such model; "
            f"{' and '.join(ARCHITECTURES)} can be exported"
        )
    if config.use_qk_norm:
        found.append("use_qk_norm=true: neither Llama nor DiffLlama normalizes queries and keys")
    if config.final_logits_soft_cap:
        found.append(f"final_logits_soft_cap={config.final_logits_soft_cap}: neither Llama nor DiffLlama caps logits")
    return found


def write(directory: Path, config: FrozenConfigDict, params: Mapping[str, Any], dtype: str, eos_id: int | None) -> None:
    """Writes weights and config.json; the tokenizer and the model card are the caller's.

    Args:
        params: the nested dict of numpy arrays.
        dtype: float32 | bfloat16, of the weights in the files; float32 is exact.

    Raises:
        ValueError: the model is neither a Llama nor a DiffLlama; every reason is named.
    """
    found = problems(config)
    if found:
        raise ValueError("; ".join(found))
    params = jax.tree.map(lambda p: np.asarray(p, dtype=np.dtype(dtype)), dict(params))
    extra = {
        path_name(path): np.ascontiguousarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path({"mtp": params.pop("mtp", {})})
    }
    weights = hf_weights.to_hugging_face(params)
    size = tokenizer.num_token_ids(config)
    for name in set(_TABLES) & set(weights):
        if config.vocab_padding:
            extra[name] = np.ascontiguousarray(weights[name][size:])
        weights[name] = weights[name][:size]
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    safetensors.save_file(contiguous, directory / WEIGHTS, metadata={"format": "pt"})
    if extra:
        safetensors.save_file(extra, directory / EXTRA)
    (directory / "config.json").write_text(json.dumps(model_config(config, dtype, eos_id), indent=2) + "\n")


def is_one(directory: Path) -> bool:
    """True for a directory of this kind, whoever wrote it."""
    return (directory / WEIGHTS).is_file() and (directory / "config.json").is_file()


def read(directory: Path, config: FrozenConfigDict, abstract_params: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of numpy parameters of the config's model; rows of padding ids that are not there become zeros.

    Raises:
        ValueError: config.json or a weight does not fit; every difference is named.
    """
    theirs = _meaning(json.loads((directory / "config.json").read_text()))
    ours = _meaning(model_config(config, "float32", None))
    if theirs["rope"]["rope_type"] == "default":  # weights trained without YaRN may be read with it: that is its use
        ours["rope"] = {"rope_theta": ours["rope"]["rope_theta"], "rope_type": "default"}
    different = [f"{key}: {theirs[key]!r} there, {ours[key]!r} here" for key in ours if theirs[key] != ours[key]]
    if different:
        raise ValueError(f"{directory} holds another model:\n  " + "\n  ".join(different))
    weights = safetensors.load_file(directory / WEIGHTS)
    extra = safetensors.load_file(directory / EXTRA) if (directory / EXTRA).is_file() else {}
    for name in set(_TABLES) & set(weights):
        width = weights[name].shape[1]
        padding = extra.pop(name, np.zeros((config.vocab_padding, width), weights[name].dtype))
        weights[name] = np.concatenate([weights[name], padding])
    trunk = {name: tree for name, tree in abstract_params.items() if name != "mtp"}
    params = hf_weights.from_hugging_face(weights, trunk)
    if "mtp" not in abstract_params:
        return params
    wanted = {"mtp": abstract_params["mtp"]}
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)}
    there = {name: array.shape for name, array in extra.items()}
    different = [
        f"{name}: {there.get(name, 'nothing')} there, {shapes.get(name, 'nothing')} needed"
        for name in sorted(shapes.keys() | there.keys())
        if there.get(name) != shapes.get(name)
    ]
    if different:
        raise ValueError(
            f"the multi-token prediction of {directory / EXTRA} does not fit:\n  "
            + "\n  ".join(different)
            + "\nmtp_num_layers=0 does without it"
        )
    mtp = jax.tree_util.tree_map_with_path(lambda path, leaf: extra[path_name(path)].astype(leaf.dtype), wanted)
    return params | mtp


def model_config(config: FrozenConfigDict, dtype: str, eos_id: int | None) -> dict[str, Any]:
    """The contents of config.json."""
    model_type, architecture = ARCHITECTURES[config.attention_type]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.rope_max_timescale)}
    length = config.original_max_position_embeddings
    if config.rope_factor != 1:
        rope |= {
            "rope_type": "yarn",
            "factor": config.rope_factor,
            "original_max_position_embeddings": length,
            "beta_fast": config.beta_fast,
            "beta_slow": config.beta_slow,
        }
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": tokenizer.num_token_ids(config),
        "hidden_size": config.base_emb_dim,
        "intermediate_size": config.base_mlp_dim,
        "num_hidden_layers": config.base_num_decoder_layers,
        "num_attention_heads": config.base_num_query_heads,
        "num_key_value_heads": config.base_num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_target_length
        if config.rope_factor == 1
        else int(length * config.rope_factor),
        "rms_norm_eps": config.normalization_layer_epsilon,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],  # this and the next line are what transformers 4 reads
        "rope_scaling": rope if config.rope_factor != 1 else None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.logits_via_embedding,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "dtype": dtype,
    }


def _meaning(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that change what the weights mean, in one form for all its versions."""
    rope = {"rope_theta": values.get("rope_theta", 10000.0)}
    rope |= values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    given = {
        key: values.get(key)
        for key in (
            "model_type",
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
        )
    }
    return given | {
        "head_dim": values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
        "hidden_act": values.get("hidden_act", "silu"),
        "attention_bias": bool(values.get("attention_bias")),
        "mlp_bias": bool(values.get("mlp_bias")),
        "tie_word_embeddings": bool(values.get("tie_word_embeddings")),
        "rope": {key: value for key, value in rope.items() if value is not None},
    }
