"""NEFTune (arXiv 2310.05914): uniform noise on embedded tokens in training, of at most `alpha / sqrt(L d)`.

L is the number of an example's tokens, without padding, and d the width of an embedding. The base is never
written: a hook adds the noise during the training forward only, so that evaluations, certificates, answers
and a method's reference pass never see it. It draws from torch's global generators, which `Randomness` seeds.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batches import MicroBatch
from .losses import Loss, TaskLoss


def with_noise(loss: Loss, alpha: float) -> Loss:
    """The same loss with noisy embeddings while the model is in training mode."""
    if not alpha:
        return loss

    def noisy(model: PreTrainedModel, batch: MicroBatch, *rest: Any, **options: Any) -> TaskLoss:
        if not model.training:
            return loss(model, batch, *rest, **options)

        def add(embedding: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            return embedded + noise(embedded, batch, alpha)

        hook = model.get_input_embeddings().register_forward_hook(add)
        try:
            return loss(model, batch, *rest, **options)
        finally:
            hook.remove()

    return noisy


def noise(embedded: Tensor, batch: MicroBatch, alpha: float) -> Tensor:
    """Noise for `embedded` (rows, length, d), in its shape and dtype, scaled by each example's length."""
    lengths = batch.lengths if batch.position_ids is None else batch.segments
    bounds = alpha / np.sqrt(np.array(lengths, dtype=np.float64) * embedded.shape[-1])
    if batch.position_ids is None:
        bounds = bounds[:, None, None]
    else:  # one row, the examples end to end
        bounds = np.repeat(bounds, lengths)[None, :, None]
    drawn = torch.empty(embedded.shape, device=embedded.device).uniform_(-1, 1)
    scaled = drawn * torch.from_numpy(bounds).to(drawn, non_blocking=True)
    return scaled.to(embedded.dtype)
