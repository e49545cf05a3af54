"""The same numbers as Hugging Face's Llama and DiffLlama: forward and gradients, both directions of the mapping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxText import hf_directory, hf_weights, models
from tests import support

CONFIGS = {
    "mha untied": {"base_num_kv_heads": 4, "logits_via_embedding": False},
    "gqa tied": {"base_num_kv_heads": 2, "rope_max_timescale": 500000},
    "mqa tied": {"base_num_kv_heads": 1, "base_num_decoder_layers": 3},
    "gqa untied wide": {
        "base_num_kv_heads": 2,
        "base_num_query_heads": 6,
        "head_dim": 16,
        "base_emb_dim": 48,
        "logits_via_embedding": False,
        "normalization_layer_epsilon": 1e-5,
    },
    "stretched by yarn": {"rope_factor": 4.0, "original_max_position_embeddings": 16, "max_target_length": 64},
    "differential mha tied": {"attention_type": "differential", "base_num_kv_heads": 4},
    "differential gqa untied deep": {
        "attention_type": "differential",
        "base_num_kv_heads": 2,
        "base_num_decoder_layers": 4,
        "logits_via_embedding": False,
    },
    "differential gqa wide": {
        "attention_type": "differential",
        "base_num_query_heads": 12,
        "base_num_kv_heads": 4,
        "head_dim": 16,
        "base_emb_dim": 48,
        "normalization_layer_epsilon": 1e-5,
        "rope_max_timescale": 500000,
    },
}


@pytest.fixture(params=CONFIGS, ids=str)
def pair(request, tmp_path):
    """(config, our params, what transformers makes of the directory that we write)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = support.small_config(**CONFIGS[request.param], initializer_range=0.2)
    params = jax.device_get(support.initial_params(config, 3))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + rng.normal(scale=0.05, size=p.shape).astype(np.float32), params)
    hf_directory.write(tmp_path, config, params, "float32", None)
    llama, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert type(llama).__name__ == hf_directory.ARCHITECTURES[config.attention_type][1]
    assert not any(report.values())
    return config, params, llama


def test_logits_and_gradients_match(pair):
    import torch

    config, params, llama = pair
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, (2, config.max_target_length + 1), dtype=np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    theirs = llama(torch.tensor(inputs, dtype=torch.long)).logits
    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), torch.tensor(targets, dtype=torch.long).flatten())
    loss.backward()

    model = models.abstract(config)
    positions = jnp.broadcast_to(jnp.arange(config.max_target_length)[None], inputs.shape)
    ones = jnp.ones(inputs.shape, jnp.int32)

    def our_loss(params):
        logits = model.merge(params).logits(jnp.asarray(inputs), positions, ones)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[..., None], axis=-1)
        return -jnp.mean(chosen), logits

    with jax.set_mesh(support.mesh_of()):
        gradients, ours = jax.jit(jax.grad(our_loss, has_aux=True))(params)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4)
    named = dict(llama.named_parameters())
    for name, gradient in hf_weights.to_hugging_face(jax.device_get(gradients)).items():
        np.testing.assert_allclose(gradient, named[name].grad.numpy(), atol=1e-4, err_msg=name)


def test_there_and_back_is_exact():
    for keys in CONFIGS.values():
        config = support.small_config(**keys)
        params = jax.device_get(support.initial_params(config))
        back = hf_weights.from_hugging_face(hf_weights.to_hugging_face(params), models.abstract(config).params)
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_what_does_not_fit_is_named():
    config = support.small_config()
    weights = hf_weights.to_hugging_face(jax.device_get(support.initial_params(config)))
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.norm.weight"] = np.zeros(5, np.float32)
    weights["lm_head.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="missing: model.layers.1.mlp.up_proj.weight") as error:
        hf_weights.from_hugging_face(weights, models.abstract(config).params)
    assert "model.norm.weight: (5,) there, (32,) needed" in str(error.value)
    assert "not used: lm_head.weight" in str(error.value)


def test_a_weight_that_llama_does_not_have_is_named():
    params = models.abstract(support.small_config(attention_type="differential_v2")).params
    with pytest.raises(ValueError, match="has a place for decoder.layers.self_attention.lambda_projection"):
        hf_weights.to_hugging_face(params)
