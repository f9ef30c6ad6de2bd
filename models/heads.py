"""Heads: what a model's raw outputs mean. Parameter-free; they own outputs per variable, loss and prediction.

A model's output corrects the target's reference: prediction = reference + scale * output, in the normalised units of
the target. Errors are measured in units of `scale`, so that easy and hard lead times weigh alike.
Letters: B batch, L lead times, C variables, K outputs per variable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import Field, Sequence

LOSSES = ("mse", "l1", "huber")


@dataclass(frozen=True)
class Prediction:
    """point: a Field in physical units (no scale, offset or reference), at the target's times and on its grid."""

    point: Field


class DeterministicHead:
    """One value a variable. loss: mse, l1 or huber (quadratic below huber_delta reference scales, linear above)."""

    outputs_per_variable = 1

    def __init__(self, *, loss: str = "mse", huber_delta: float = 1.0):
        if loss not in LOSSES:
            raise ValueError(f"task.loss={loss} is unknown; use one of {', '.join(LOSSES)}")
        if huber_delta <= 0:
            raise ValueError(f"task.huber_delta={huber_delta} must be greater than 0")
        self.loss_name, self.huber_delta = loss, huber_delta

    def loss(self, output: Tensor, target: Field, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weighted sum of errors, sum of weights), each (L, C): divide after adding both over ranks and batches.

        output: (B, L, C, *grid.shape). weights: broadcastable to it (cell areas, variables, lead times), or None.
        Values that are not present are never read: neither they nor the output there change the loss or a gradient.
        """
        truth = residual(target)
        presence = target.presence
        weight = torch.ones_like(truth) if weights is None else weights.to(truth.dtype).expand_as(truth)
        if presence is not None:
            output, truth = torch.where(presence, output, 0.0), torch.where(presence, truth, 0.0)
            weight = weight * presence
        error = _error(self.loss_name, output.to(truth.dtype), truth, self.huber_delta)
        places = (0, *range(3, truth.ndim))
        return (weight * error).sum(places), weight.sum(places)

    def predict(self, output: Tensor, target: Field) -> Prediction:
        """output: (B, L, C, *grid.shape). Only the target's reference and normalisation are read, never its values."""
        values = output.float()
        if target.reference is not None:
            values = target.reference.values + target.reference.scale * values
        plain = replace(target, values=target.physical(values), scale=None, offset=None, reference=None, valid=None)
        return Prediction(point=plain)


def residual(target: Field) -> Tensor:
    """(B, L, C, *grid.shape): what the output should be, (truth - reference) / scale; undefined where not present."""
    if target.reference is None:
        return target.values
    return (target.values - target.reference.values) / target.reference.scale


def _error(loss: str, output: Tensor, truth: Tensor, delta: float) -> Tensor:
    if loss == "mse":
        return (output - truth).square()
    if loss == "l1":
        return (output - truth).abs()
    return F.huber_loss(output, truth, reduction="none", delta=delta)


@dataclass(frozen=True)
class TokenPrediction:
    """probabilities: (B, L, V) of each token of the vocabulary."""

    probabilities: Tensor


class TokenHead:
    """Logits of a vocabulary; the loss is the cross-entropy."""

    outputs_per_variable = 1  # the vocabulary's tokens are the variables

    def __init__(self, *, loss: str = "cross_entropy", huber_delta: float = 1.0):
        if loss != "cross_entropy":
            raise ValueError(f"task.loss={loss} is unknown for task.head=token; use task.loss=cross_entropy")

    def loss(self, output: Tensor, target: Sequence) -> tuple[Tensor, Tensor]:
        """(sum of errors in nats, number of tokens), each (L,); what is not valid is not read.

        output: (B, L, V) logits.
        """
        error = F.cross_entropy(output.float().flatten(0, 1), target.filled.flatten(), reduction="none")
        error = error.view_as(target.tokens)
        valid = torch.ones_like(error) if target.valid is None else target.valid.to(error.dtype)
        return (error * valid).sum(0), valid.sum(0)

    def predict(self, output: Tensor, target: Sequence) -> TokenPrediction:
        return TokenPrediction(output.float().softmax(dim=-1))


HEADS = {"deterministic": DeterministicHead, "token": TokenHead}


def build_head(name: str, *, loss: str, huber_delta: float = 1.0) -> DeterministicHead | TokenHead:
    """The head of `task.head` with the loss of `task.loss`. Raises ValueError for unknown names."""
    if name not in HEADS:
        raise ValueError(f"task.head={name} is unknown; use one of {', '.join(HEADS)}")
    return HEADS[name](loss=loss, huber_delta=huber_delta)
