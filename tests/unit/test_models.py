"""What the model must be: its exact size, causal, blind to other rows and documents, and one layer of program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxText import config_rules, flops, loss, models, pyconfig, sharding, train_step
from MaxText.layers import decoder, multi_token_prediction
from tests import support

ATTENTIONS = ["standard 1", "standard 2", "standard 4", "differential 2", "differential 4"]
ATTENTIONS += ["differential_v2 1", "differential_v2 2"]


@pytest.fixture(params=ATTENTIONS)
def logits_of(request):
    """(config, batch -> logits) for each type of attention and number of key/value heads."""
    attention_type, num_kv_heads = request.param.split()
    config = support.small_config(attention_type=attention_type, base_num_kv_heads=num_kv_heads)
    model = models.abstract(config)
    params = jax.jit(lambda key: models.initial_params(config, key))(jax.random.key(0))

    @jax.jit
    def logits(batch):
        return model.merge(params).logits(batch["inputs"], batch["inputs_position"], batch["inputs_segmentation"])

    with jax.set_mesh(support.mesh_of()):
        yield config, lambda batch: np.asarray(logits(batch))


def test_validate_10m_has_exactly_the_seeds_parameters():
    config = pyconfig.initialize([str(support.ROOT / "configs/validate_10m.yml")], {})
    count = flops.count_parameters(models.abstract(config).params)
    assert str(count) == "18,287,872 (12,582,912 embedding, 5,704,960 other)"


def test_pythonlm_has_1_08_billion_parameters():
    config = support.shipped_config(support.ROOT / "configs/pythonlm_1b.yml")
    dim, layers, vocabulary = 1536, 24, 151808
    attention = 2 * dim * 12 * 128 + 2 * dim * 4 * 128 + 4 * 128  # query and out, key and value, lambda vectors
    layer = attention + 3 * dim * 4096 + 2 * dim
    head_ahead = 2 * dim * dim + 3 * dim
    total = 2 * vocabulary * dim + layers * layer + dim + head_ahead
    count = flops.count_parameters(models.abstract(config).params)
    assert (count.total, count.embedding) == (total, 2 * vocabulary * dim)
    assert str(count) == "1,075,144,704 (466,354,176 embedding, 608,790,528 other)"


def test_flops_per_token_by_hand():
    # one layer, D=2, N=2, K=2, H=3, F=5, V=7, length 4
    shape = {"dim": 2, "num_layers": 1, "num_query_heads": 2, "num_kv_heads": 2, "head_dim": 3, "mlp_dim": 5}
    shape |= {"vocab_size": 7, "length": 4}
    weights = 2 * (2 * 3) * 2 + 2 * (2 * 3) * 2 + 3 * 2 * 5 + 2 * 7  # query and out, key and value, mlp, logits
    pairs_per_token = (1 + 2 + 3 + 4) / 4
    standard = 6 * weights + 3 * 2 * 2 * (2 * 3) * pairs_per_token  # scores and values of two heads of 3
    shape |= {"mtp_num_layers": 0, "mtp_transformer_block": False}
    assert flops.flops_per_token(**shape, attention_type="standard") == standard
    # Two maps of 3, one product with values of 6: the same numbers.
    assert flops.flops_per_token(**shape, attention_type="differential") == standard
    # Two heads, two maps and a gate more.
    more = 6 * (2 * (2 * 3) + 2 * 2) + 3 * 2 * (2 * 3) * pairs_per_token
    assert flops.flops_per_token(**shape, attention_type="differential_v2") == standard + more
    # Two heads ahead: each a projection from 2D to D and the logits; with a block, each is a layer as well.
    heads = 2 * 6 * (2 * 2 * 2 + 2 * 7)
    shape |= {"attention_type": "standard", "mtp_num_layers": 2}
    assert flops.flops_per_token(**shape) == standard + heads
    assert flops.flops_per_token(**shape | {"mtp_transformer_block": True}) == 3 * standard + heads - 2 * 6 * 2 * 7


@pytest.mark.parametrize("block", [True, False])
def test_a_head_ahead_sees_its_tokens_of_its_document_and_no_other(block):
    """Head k at position t may depend on tokens up to t + k of t's document: every token of every row is tried."""
    keys = {"attention_type": "differential", "base_num_kv_heads": 2, "initializer_range": 0.3}
    config = support.small_config(**keys, mtp_num_layers=2, mtp_transformer_block=block)
    model, params = models.abstract(config), support.initial_params(config)
    batch = support.packed_batch(config, rows=4, seed=0)
    weights = jnp.asarray(batch["targets_segmentation"] != 0, jnp.float32)
    where = (jnp.asarray(batch["inputs_position"]), jnp.asarray(batch["inputs_segmentation"]))

    @jax.jit
    def heads(inputs, targets):
        return model.merge(params).of_all_heads(inputs, *where, targets, weights, None)

    length = config.max_target_length
    tokens = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
    segments = np.concatenate([batch["inputs_segmentation"], batch["targets_segmentation"][:, -1:]], axis=1)
    seen = 0
    with jax.set_mesh(support.mesh_of()):
        before = jax.device_get(heads(tokens[:, :-1], tokens[:, 1:]))
        for place in range(length + 1):
            changed = tokens.copy()
            changed[:, place] = (changed[:, place] + 1) % config.vocab_size
            after = jax.device_get(heads(changed[:, :-1], changed[:, 1:]))
            for k in range(3):
                differs = (after[k] != before[k]).any(-1)
                same_document = segments[:, :-1] == segments[:, place : place + 1]
                allowed = same_document & (np.arange(length) + k >= place)
                assert not (differs & ~allowed).any(), (k, place)
                seen += differs.sum()
    assert seen > 3 * length  # and it does depend on those


def test_targets_ahead_are_of_the_same_document():
    targets = jax.numpy.array([[11, 12, 21, 22, 23, 0]])
    weights = jax.numpy.array([[1.0, 0.0, 1.0, 1.0, 0.0, 0.0]])  # a document ends after the second and the fifth input
    (one, counted), (two, both), (_, three) = multi_token_prediction.ahead(targets, weights, 3)
    assert one.tolist() == targets.tolist() and counted.tolist() == weights.tolist()
    assert two.tolist() == [[12, 21, 22, 23, 0, 0]] and both.tolist() == [[0, 0, 1, 0, 0, 0]]
    assert three.tolist() == [[0] * 6]


def test_a_token_changes_no_logit_before_it(logits_of):
    config, logits = logits_of
    batch = support.packed_batch(config, rows=4, seed=0)
    batch["inputs_segmentation"] = np.ones_like(batch["inputs"])
    before = logits(batch)
    for t in (1, 7, config.max_target_length - 1):
        inputs = batch["inputs"].copy()
        inputs[:, t] = (inputs[:, t] + 1) % config.vocab_size
        after = logits(batch | {"inputs": inputs})
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(axis=(1, 2)).all()


def test_gradient_of_a_logit_is_zero_after_its_token(logits_of):
    config, _ = logits_of
    model = models.abstract(config)
    params = support.initial_params(config)
    batch = jax.device_put(support.packed_batch(config, rows=1, seed=0))
    ones = jnp.ones_like(batch["inputs"])

    def logit_at_five(x):
        transformer = model.merge(params)
        hidden = transformer.decoder(x, *transformer.rotary.tables(batch["inputs_position"]), ones, None)
        return jnp.sum(hidden[0, 5])

    x = jnp.asarray(
        np.random.default_rng(0).normal(size=(1, config.max_target_length, config.base_emb_dim)), jnp.float32
    )
    gradient = np.asarray(jax.jit(jax.grad(logit_at_five))(x))
    assert (gradient[0, 6:] == 0).all()
    assert (gradient[0, :6] != 0).any(axis=-1).all()


def test_rows_are_independent(logits_of):
    config, logits = logits_of
    batch = support.packed_batch(config, rows=4, seed=0)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(logits({k: v[order] for k, v in batch.items()}), logits(batch)[order])


def test_documents_of_a_row_do_not_see_each_other(logits_of):
    config, logits = logits_of
    batch = support.packed_batch(config, rows=4, seed=0)
    before = logits(batch)
    first = batch["inputs_segmentation"] == 1
    changed = batch | {"inputs": np.where(first, (batch["inputs"] + 1) % config.vocab_size, batch["inputs"])}
    np.testing.assert_array_equal(logits(changed)[~first], before[~first])


def test_initial_loss_is_that_of_a_uniform_guess():
    config = support.small_config()
    metrics = support.Trainer(config, support.mesh_of())(support.packed_batch(config, rows=8, seed=0))
    assert metrics["learning/loss"] == pytest.approx(np.log(config.vocab_size), abs=0.05)


@pytest.mark.parametrize(
    "policy",
    [
        "minimal",
        "attention",
        "full",
        "custom",
        "custom query_proj=device mlpwi_0=device",
        "custom decoder_layer_input=offload",
    ],
)
def test_remat_changes_what_is_kept_and_not_the_gradient(policy):
    policy, *places = policy.split()

    def gradients(**keys):
        config = support.small_config(**keys)
        trainer = support.Trainer(config, support.mesh_of())
        return lowered_step(config, trainer), after_one_step(config, trainer)

    plain_program, plain = gradients(remat_policy="none")
    program, got = gradients(remat_policy=policy, **dict(place.split("=") for place in places))
    assert program != plain_program
    assert ("annotate_device_placement" in program) == ("offload" in " ".join(places))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, plain)


def after_one_step(config, trainer):
    trainer(support.packed_batch(config, rows=4, seed=0))
    trainer(support.packed_batch(config, rows=4, seed=1))
    return trainer.state.params


def test_every_remat_policy_is_another_program():
    configs = [support.small_config(remat_policy=policy) for policy in ("none", "minimal", "attention", "full")]
    assert len({lowered_step(config, support.Trainer(config, support.mesh_of())) for config in configs}) == 4


def lowered_step(config, trainer):
    batch = train_step.abstract_batch(4, config.max_target_length, trainer.mesh)
    with jax.set_mesh(trainer.mesh):
        return trainer.step.lower(trainer.abstract, batch).as_text()


def test_the_program_does_not_grow_with_depth():
    def program(num_layers):
        config = support.small_config(base_num_decoder_layers=num_layers)
        model = models.abstract(config)
        batch = train_step.abstract_batch(4, config.max_target_length, support.mesh_of())
        with jax.set_mesh(support.mesh_of()):
            gradient = jax.jit(
                jax.grad(lambda p, b: loss.training_sums(config, model, p, b, mtp_weight=0.3, head_dtype="float32")[0])
            )
            return gradient.lower(model.params, batch).as_text().count("\n")

    assert program(3) == program(12)


def test_the_config_names_every_tensor_a_policy_can_keep():
    assert config_rules.REMAT_KEYS == decoder.CHECKPOINT_NAMES


@pytest.mark.parametrize("attention_type", models.ATTENTION_TYPES)
def test_every_weight_names_as_many_axes_as_it_has(attention_type):
    keys = {"attention_type": attention_type, "base_num_kv_heads": 2, "logits_via_embedding": False}
    model = models.abstract(support.small_config(**keys))
    axes = jax.tree.leaves(model.logical_axes, is_leaf=lambda node: isinstance(node, tuple))
    for leaf, names in zip(jax.tree.leaves(model.params), axes, strict=True):
        assert len(names) == leaf.ndim
        assert set(names) <= set(sharding.RULES)


@pytest.mark.parametrize(("scale", "want"), [(-1.0, 0.02 / 2), (0.0, 0.0), (0.5, 0.01)])
def test_what_writes_to_the_residual_stream_starts_smaller(scale, want):
    config = support.small_config(residual_init_scale=scale, mtp_num_layers=1, mtp_transformer_block=True)
    with jax.set_mesh(support.mesh_of()):
        params = support.initial_params(config)
    for layers in (params["decoder"]["layers"], params["mtp"]["layers"]["block"]):
        for weight in (layers["self_attention"]["out"], layers["mlp"]["wo"]):
            assert float(np.std(weight)) == pytest.approx(want, rel=0.1)
        assert float(np.std(layers["mlp"]["wi_0"])) == pytest.approx(0.02, rel=0.1)
