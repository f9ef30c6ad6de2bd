"""Scores of ensembles that a model of tokens draws: their mean and their spread, beside simple forecasts.

Everything is scored on block means, the resolution of the tokens. Letters: B windows, G forecast frames, K tokens of a
frame, M members.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data.datasets.token_windows import TokenWindows
from data.sequence import Sequence
from evaluation.evaluation import OURS
from evaluation.summary import format_table
from models.generation import Sampling, generate

SCORES = ("rmse", "crps")
CLIMATOLOGY_MEMBERS = 50
_SEQUENCES = 512  # that are drawn at a time


@dataclass(frozen=True)
class EnsembleScores:
    """scores: {variable: {score: {hours: {method: value}}}}, physical units. windows: how many forecasts."""

    scores: dict
    windows: int


def crps(members: Tensor, truth: Tensor) -> Tensor:
    """Continuous ranked probability score of M members (M, ...) against the truth (...), the fair estimate:

        mean |x - y| - sum |x - x'| / (2 M (M - 1));   one member: |x - y|.

    Source: Ferro (2014), doi:10.1002/qj.2270.
    """
    count = members.shape[0]
    error = (members - truth).abs().mean(dim=0)
    if count == 1:
        return error
    # The sum over pairs from the sorted members: member i is larger than i others and smaller than M - 1 - i.
    rank = torch.arange(count, dtype=members.dtype, device=members.device)
    weights = (2 * rank - count + 1).reshape(-1, *[1] * truth.ndim)
    spread = (members.sort(dim=0).values * weights).sum(dim=0)
    return error - spread / (count * (count - 1))


def score_ensembles(
    model: nn.Module,
    dataset: TokenWindows,
    *,
    members: int,
    sampling: Sampling,
    max_windows: int | None = None,
    seed: int = 0,
) -> EnsembleScores:
    """RMSE of the ensemble mean and CRPS of each variable and lead time, over all blocks by area.

    persistence: the last input frame, of blocks that it observed; damped_persistence: its anomaly times the factor of
    the training period; climatology: for the CRPS the anomalies of frames drawn from the training period, for the RMSE
    none. max_windows: that many, evenly spread. Raises ValueError where it is not at least 1.
    """
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows} must be at least 1; null takes the whole split")
    count = len(dataset) if max_windows is None else min(max_windows, len(dataset))
    positions = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int))
    sums = _Sums(dataset)
    climatology = _climatology(dataset, seed)
    normalisation = dataset.quantiser.normalisation
    damping = normalisation.damping[normalisation.lead_index(dataset.lead_steps)][:, dataset.blocks.variable]  # (G, K)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for chosen in np.array_split(positions, -(-positions.size * members // _SEQUENCES)):
        frames, batch = dataset.frames(chosen), dataset.__getitems__(chosen)
        last, truth = dataset.input_frames - 1, frames.anomalies[:, dataset.input_frames :]
        drawn = _ensemble(model, dataset, batch.inputs["tokens"], members, sampling, generator)  # (M, B, G, K)
        sums.add(OURS, "rmse", (drawn.mean(dim=0) - truth).square(), truth)
        sums.add(OURS, "crps", crps(drawn, truth), truth)
        now = frames.anomalies[:, last : last + 1]
        change = frames.climatology[:, last : last + 1] - frames.climatology[:, dataset.input_frames :]
        for name, forecast in (("persistence", now + change), ("damped_persistence", damping * now)):
            forecast = forecast.nan_to_num(0.0)
            sums.add(name, "rmse", (forecast - truth).square(), truth)
            sums.add(name, "crps", (forecast - truth).abs(), truth)
        sums.add("climatology", "rmse", truth.square(), truth)
        sums.add("climatology", "crps", crps(climatology[:, None, None].expand(-1, *truth.shape[:2], -1), truth), truth)
    return EnsembleScores(sums.content(), positions.size)


def _ensemble(
    model: nn.Module,
    dataset: TokenWindows,
    given: Sequence,
    members: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> Tensor:
    """(M, B, G, K) anomalies that go on from the prefix and its first latent."""
    prompt = Sequence(given.tokens[:, : given.prefix_len + 1].repeat(members, 1), prefix_len=given.prefix_len)
    quantiser, frame = dataset.quantiser, dataset.blocks.num_tokens
    allowed = torch.arange(quantiser.vocab_size, device=generator.device) < quantiser.bins
    tokens = generate(
        model,
        prompt.to(generator.device),
        len(dataset.lead_steps) * frame,
        sampling=sampling,
        generator=generator,
        allowed=allowed,
    ).cpu()
    anomalies = quantiser.anomalies(tokens.unflatten(1, (-1, frame)), dataset.blocks)
    return anomalies.unflatten(0, (members, -1))


def _climatology(dataset: TokenWindows, seed: int) -> Tensor:
    """(m, K) anomalies of frames of the training period; a block without a value counts with none."""
    data, normalisation = dataset.data, dataset.quantiser.normalisation
    count = min(CLIMATOLOGY_MEMBERS, data.training_period.size)
    frames = np.sort(np.random.default_rng(seed).choice(data.training_period, count, replace=False))
    anomalies = normalisation.anomalies(data.read(frames), data.times[frames])
    return dataset.blocks.means(anomalies).nan_to_num(0.0)


class _Sums:
    """Area-weighted sums of errors, method by method."""

    def __init__(self, dataset: TokenWindows):
        self.dataset = dataset
        self.errors: dict[tuple[str, str], Tensor] = {}
        self.weights: dict[tuple[str, str], Tensor] = {}

    def add(self, method: str, score: str, errors: Tensor, truth: Tensor) -> None:
        """errors: (B, G, K); counted where the truth is known."""
        blocks = self.dataset.blocks
        known = truth.isfinite()
        of_variable = torch.zeros(blocks.num_tokens, len(self.dataset.data.variables), dtype=torch.float64)
        of_variable[torch.arange(blocks.num_tokens), blocks.variable] = blocks.weights
        error = torch.where(known, errors, 0.0).double().sum(0) @ of_variable  # (G, C)
        weight = known.double().sum(0) @ of_variable
        key = method, score
        self.errors[key] = self.errors.get(key, 0.0) + error
        self.weights[key] = self.weights.get(key, 0.0) + weight

    def content(self) -> dict:
        data, scale = self.dataset.data, self.dataset.quantiser.normalisation.scale.double()
        values: dict = {}
        for (method, score), errors in self.errors.items():
            mean = errors / self.weights[method, score]
            mean = (mean.sqrt() if score == "rmse" else mean) * scale
            for lead, hours in enumerate(self.dataset.lead_hours):
                for channel, variable in enumerate(data.variables):
                    if mean[lead, channel].isfinite():
                        by_score = values.setdefault(variable.label, {name: {} for name in SCORES})
                        by_score[score].setdefault(f"{hours:g}", {})[method] = float(mean[lead, channel])
        return values


def format_scores(scores: dict) -> str:
    """Tables for people, one a variable and score."""
    return "\n\n".join(format_table(scores, score=score) for score in SCORES)
