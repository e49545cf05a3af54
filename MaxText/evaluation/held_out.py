"""Loss, perplexity and bits per byte on held-out data.

Every evaluation reads the same batches. Bits per byte count the UTF-8 bytes of the predicted tokens, so models with
different tokenizers can be compared.
"""

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from MaxText import models, sharding, train_step
from MaxText.input_pipeline import device, loader
from MaxText.train_state import TrainState


class HeldOut:
    """The evaluation of one run; call it with parameters, under the mesh, when no training step is under way."""

    def __init__(
        self,
        config: FrozenConfigDict,
        mesh: jax.sharding.Mesh,
        model: models.AbstractModel,
        abstract: TrainState,
        data: loader.Datasets,
    ):
        assert data.evaluation is not None
        self._dataset = data.evaluation
        self._rows = config.eval_per_device_batch_size * mesh.size
        self._batch = train_step.abstract_batch(self._rows, config.max_target_length, mesh)
        self._where = sharding.batch_sharding(mesh)
        self._step: Any = train_step.make_eval_step(config, model, abstract, mesh)
        self._is_compiled = False
        known = data.token_bytes
        self._token_bytes = np.zeros(config.vocab_size, np.int32) if known is None else known
        available = self._dataset.num_batches(self._rows)
        self._num_batches = available if config.eval_steps == -1 else min(config.eval_steps, available)

    def compile(self, params: Any, wait_for: Callable[[Callable[[], Any]], Any]) -> None:
        """Compiles the evaluation step, once; `wait_for` calls what it is given, and may give it up."""
        if not self._is_compiled:
            self._step = wait_for(self._step.lower(params, self._batch, self._token_bytes).compile)
            self._is_compiled = True

    def __call__(self, params: Any, alive: Callable[[], None] = lambda: None) -> dict[str, float]:
        """The metrics under their names; bits per byte only where the data has bytes.

        Args:
            alive: called after each batch.
        """
        sums: collections.Counter[str] = collections.Counter()
        for index in range(self._num_batches):
            batch = device.global_batch(self._dataset, index, self._rows, self._where)
            result = jax.device_get(self._step(params, batch, self._token_bytes))
            sums.update({name: float(value) for name, value in result.items()})
            alive()
        nll, weights, num_bytes = sums["nll"], sums["total_weights"], sums["bytes"]
        loss = nll / max(weights, 1.0)
        metrics = {
            "eval/avg_loss": loss,
            "eval/avg_perplexity": math.exp(min(loss, 700.0)),
            "eval/total_weights": weights,
        }
        if num_bytes:
            metrics["eval/bits_per_byte"] = nll / math.log(2) / num_bytes
        if sums["mtp_weights"]:
            metrics["eval/avg_mtp_loss"] = sums["mtp_nll"] / sums["mtp_weights"]
            metrics["eval/avg_mtp_acceptance_rate_percent"] = 100 * sums["mtp_accepted"] / sums["mtp_weights"]
        return metrics
