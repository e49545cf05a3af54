"""The loss of several heads and what decoding would accept of them, against sums over tokens in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxText import loss, models
from tests import support

PADDING, WEIGHT, Z_LOSS = 120, 0.3, 1e-2


def test_every_sum_is_that_over_the_tokens_one_by_one():
    config = support.small_config(
        mtp_num_layers=2, mtp_transformer_block=True, initializer_range=0.3, vocab_padding=PADDING,
        z_loss_multiplier=Z_LOSS, final_logits_soft_cap=5.0,
    )  # fmt: skip
    batch = support.packed_batch(config, rows=4, seed=0)
    batch |= {name: np.minimum(batch[name], config.vocab_size - PADDING - 1) for name in ("inputs", "targets")}
    counts = batch["targets_segmentation"] != 0
    placed = jax.tree.map(jnp.asarray, batch)
    model = models.abstract(config)
    with jax.set_mesh(support.mesh_of()):
        params = support.initial_params(config, 1)
        train = functools.partial(loss.training_sums, config, model, mtp_weight=WEIGHT, head_dtype="float32")
        total, sums = jax.jit(train)(params, placed)
        evaluated = jax.jit(lambda *arrays: loss.evaluation_sums(config, model, *arrays, "float32"))(params, placed)
        inputs = [placed[name] for name in ("inputs", "inputs_position", "inputs_segmentation", "targets")]

        def of_all_heads(params, *inputs):
            whole = model.merge(params)
            return [whole.scores(hidden) for hidden in whole.of_all_heads(*inputs, None)]

        found = jax.jit(of_all_heads)(params, *inputs, jnp.asarray(counts, jnp.float32))
        scores = [np.asarray(each, np.float64)[..., :-PADDING] for each in found]

    tokens = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
    chosen = [each.argmax(-1) for each in scores]
    nll, squares, weights, accepted = np.zeros(3), np.zeros(3), np.zeros(3), 0
    for row, place in np.argwhere(counts):
        agreed = True
        for head in range(3):
            if not counts[row, place : place + head + 1].all() or place + head >= counts.shape[1]:
                break
            here = scores[head][row, place]
            log_sum = np.log(np.exp(here).sum())
            nll[head] += log_sum - here[tokens[row, place + head + 1]]
            squares[head] += Z_LOSS * log_sum**2
            weights[head] += 1
            agreed = agreed and chosen[head][row, place] == chosen[0][row, place + head]
            accepted += agreed and head > 0

    scale = WEIGHT / 2
    assert weights[0] > weights[1] > weights[2] > 0
    want = {
        "lm_loss": nll[0],
        "mtp_loss": nll[1] + nll[2],
        "z_loss": squares[0] + scale * (squares[1] + squares[2]),
        "loss": nll[0] + squares[0] + scale * (nll[1:].sum() + squares[1:].sum()),
        "total_weights": weights[0],
        "mtp_weights": weights[1] + weights[2],
    }
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(want, rel=1e-4)
    assert float(total) == pytest.approx(want["loss"], rel=1e-5)
    assert accepted > 0
    want = {"nll": nll[0], "mtp_nll": nll[1] + nll[2], "mtp_accepted": accepted}
    want |= {"total_weights": weights[0], "mtp_weights": weights[1] + weights[2]}
    assert {name: float(value) for name, value in evaluated.items()} == pytest.approx(want, rel=1e-4)
