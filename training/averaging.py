"""Exponential moving average of a model's weights: the weights that are validated, kept as best and shipped."""

from __future__ import annotations

import copy

import torch
from torch import nn

from training.sharding import local


class WeightAverage:
    """average <- d * average + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    The ramp lets short runs forget their initialisation. Buffers are copied. `model`: the averaged twin, in eval mode;
    where weights are sharded over ranks, so is it, and each rank averages what it holds.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(
                f"trainer.ema_decay={decay} must lie in [0, 1); trainer.ema_decay=null turns averaging off"
            )
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [local(average) for average in self.model.parameters()]
        weights = [local(weight.detach()) for weight in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.updates += 1
