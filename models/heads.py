"""Heads: what a model's raw outputs mean. Parameter-free; they own outputs per variable, loss and prediction.

A model's output corrects the target's reference: prediction = reference + scale * output, in the normalised units of
the target. Errors are measured in units of `scale`, so that easy and hard lead times weigh alike.
Letters: B batch, L lead times, C variables, K outputs per variable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from data.field import Field
from data.sequence import Sequence

LOSSES = ("mse", "l1", "huber")


@dataclass(frozen=True)
class Prediction:
    """point: a Field in physical units (no scale, offset or reference), at the target's times and on its grid.

    probabilities: (B, L, C, K, *grid.shape) of the K bins, where the head is categorical.
    """

    point: Field
    probabilities: Tensor | None = None


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
        return Prediction(point=_plain(target, target.physical(_corrected(output, target))))


class CategoricalHead:
    """Probabilities of bins between increasing edges (MetNet, arXiv:2003.12140, section 4), K = edges + 1 a variable.

    bins: the edges in physical units; the first bin is all below the first edge, the last one all from the last edge
    up. loss: cross_entropy, in nats. References are not read: a model that needs one reads it as an input.
    Raises ValueError where the edges do not increase.
    """

    def __init__(self, *, loss: str = "cross_entropy", bins: list[float]):
        if loss != "cross_entropy":
            raise ValueError(f"task.loss={loss} is unknown for task.head=categorical; use task.loss=cross_entropy")
        if not bins or not all(lower < upper < math.inf for lower, upper in pairwise([0.0, *bins])):
            raise ValueError(
                f"task.bins={list(bins or [])} must be increasing edges above 0, like task.bins=[0.1,0.5,1,2,5]"
            )
        edges = [float(edge) for edge in bins]
        # What a bin stands for: 0, the geometric middle of its edges, and a quarter above the last edge.
        middles = [math.sqrt(lower * upper) for lower, upper in pairwise(edges)]
        self.edges = torch.tensor(edges, device="cpu")
        self.values = torch.tensor([0.0, *middles, 1.25 * edges[-1]], device="cpu")
        self.outputs_per_variable = len(bins) + 1

    def loss(self, output: Tensor, target: Field, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weighted sum of errors in nats, sum of weights), each (L, C). output: (B, L, C K, *grid.shape).

        Values that are not present are never read.
        """
        truth, presence = target.physical(), target.presence
        weight = torch.ones_like(truth) if weights is None else weights.to(truth.dtype).expand_as(truth)
        if presence is not None:
            truth, weight = torch.where(presence, truth, 0.0), weight * presence
        # A rate that was an edge before it was normalised may have lost its last digits.
        wanted = torch.bucketize(
            truth.contiguous() * (1 + 1e-5), self.edges.to(truth.device, non_blocking=True), right=True
        )
        logits = self._by_bin(output)
        if presence is not None:
            logits = torch.where(presence.expand_as(truth).unsqueeze(3), logits, 0.0)
        error = -logits.log_softmax(dim=3).gather(3, wanted.unsqueeze(3)).squeeze(3)
        places = (0, *range(3, truth.ndim))
        return (weight * error).sum(places), weight.sum(places)

    def predict(self, output: Tensor, target: Field) -> Prediction:
        """The point forecast is the median: the bin that half of the probability reaches."""
        probabilities = self._by_bin(output).softmax(dim=3)
        median = self.point(probabilities, torch.full_like(self.edges, 0.5))
        return Prediction(_plain(target, median), probabilities)

    def point(self, probabilities: Tensor, levels: Tensor) -> Tensor:
        """(B, L, C, K, ...) -> (B, L, C, ...): the highest edge that is exceeded with at least its level, as its bin.

        levels: (K - 1,) or (L, K - 1), a probability for each edge.
        """
        levels = levels.to(probabilities)
        if levels.ndim == 2:
            levels = levels[:, None]  # (L, 1, K - 1): the same for all variables
        levels = levels.reshape(*levels.shape, *[1] * (probabilities.ndim - 4))
        reached = self.exceedance(probabilities) >= levels
        order = torch.arange(1, reached.shape[3] + 1, device=reached.device, dtype=torch.int32)
        highest = (reached * order.reshape(-1, *[1] * (probabilities.ndim - 4))).amax(dim=3)
        return self.values.to(probabilities)[highest]

    @staticmethod
    def exceedance(probabilities: Tensor) -> Tensor:
        """(B, L, C, K, ...) of bins -> (B, L, C, K - 1, ...) of reaching each edge."""
        from_the_last = list(accumulate(reversed(probabilities.unbind(3))))  # faster than a sum along a middle axis
        return torch.stack(from_the_last[-2::-1], dim=3)

    def _by_bin(self, output: Tensor) -> Tensor:
        """(B, L, C K, ...) -> (B, L, C, K, ...)"""
        return output.float().unflatten(2, (-1, self.outputs_per_variable))


def _corrected(output: Tensor, target: Field) -> Tensor:
    """The target's reference, corrected by an output of its shape: float32, in the target's normalised units."""
    values = output.float()
    if target.reference is None:
        return values
    return target.reference.values + target.reference.scale * values


def _plain(target: Field, values: Tensor) -> Field:
    """Physical values in place of a target's."""
    return replace(target, values=values, scale=None, offset=None, reference=None, valid=None, transform=None)


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


class ClassHead:
    """Logits of classes that exclude each other, which are the variables of the target; the loss is the cross-entropy.

    The target holds 1 at the class that came and 0 elsewhere; its reference holds logarithms of probabilities, which an
    output of 0 leaves as they are.
    """

    outputs_per_variable = 1

    def __init__(self, *, loss: str = "cross_entropy", huber_delta: float = 1.0):
        if loss != "cross_entropy":
            raise ValueError(f"task.loss={loss} is unknown for task.head=classes; use task.loss=cross_entropy")

    def loss(self, output: Tensor, target: Field, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weighted sum of errors in nats, sum of weights), (L, C) each: quotients have the cross-entropy as mean.

        output: (B, L, C, *grid.shape). Values that are not present are never read.
        """
        truth, presence, logits = target.values, target.presence, _corrected(output, target)
        weight = torch.ones_like(truth) if weights is None else weights.to(truth.dtype).expand_as(truth)
        if presence is not None:
            logits, truth = torch.where(presence, logits, 0.0), torch.where(presence, truth, 0.0)
            weight = weight * presence
        error = -logits.shape[2] * truth * logits.log_softmax(dim=2)
        places = (0, *range(3, truth.ndim))
        return (weight * error).sum(places), weight.sum(places)

    def predict(self, output: Tensor, target: Field) -> Prediction:
        """The point forecast is the probability of each class."""
        return Prediction(_plain(target, _corrected(output, target).softmax(dim=2)))


HEADS = {"deterministic": DeterministicHead, "classes": ClassHead, "categorical": CategoricalHead, "token": TokenHead}


def build_head(
    name: str, *, loss: str, huber_delta: float = 1.0, bins: Iterable[float] | None = None
) -> DeterministicHead | CategoricalHead | TokenHead:
    """The head of `task.head` with the loss of `task.loss` and, where it is categorical, the edges of `task.bins`.

    Raises ValueError for unknown names.
    """
    if name not in HEADS:
        raise ValueError(f"task.head={name} is unknown; use one of {', '.join(HEADS)}")
    if name == "categorical":
        return CategoricalHead(loss=loss, bins=list(bins or []))
    return HEADS[name](loss=loss, huber_delta=huber_delta)
