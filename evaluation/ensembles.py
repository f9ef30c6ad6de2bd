"""Scores of ensembles that a model of tokens draws: their mean and their spread, beside simple forecasts.

Everything is scored on block means, the resolution of the tokens. Letters: B windows, G forecast frames, K tokens of a
frame, M members.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data.datasets.token_windows import BlockFrames, TokenWindows
from data.sequence import Sequence
from evaluation.evaluation import OURS
from evaluation.summary import format_table
from models.generation import Sampling, generate

SCORES = ("rmse", "crps")
CLIMATOLOGY_MEMBERS = 50
_SEQUENCES = 512  # that are drawn at a time


@dataclass(frozen=True)
class Ensemble:
    """One forecast in physical units: members (G, M, C, *places.shape), and what came (G, C, *places.shape), NaN where
    it is not known. base: index of its last input frame."""

    base: int
    members: Tensor
    truth: Tensor


@dataclass(frozen=True)
class EnsembleScores:
    """scores: {variable: {score: {hours: {method: value}}}}, physical units. spread: {variable: {hours: root of the
    members' mean variance}}, which a reliable ensemble shares with the RMSE of its mean. bases: (n,) of all forecasts.
    example: the one in their middle."""

    scores: dict
    spread: dict
    bases: np.ndarray
    example: Ensemble


@dataclass(frozen=True)
class Draw:
    """Work for one rank: sequences that go on from prompts, as a model of tokens draws them. allowed: (V,) bool."""

    prompt: Sequence
    num_tokens: int
    sampling: Sampling
    seed: int
    allowed: Tensor

    def __call__(self, model: nn.Module) -> Tensor:
        """(sequences, num_tokens) int64, on the CPU."""
        device = next(model.parameters()).device
        drawn = generate(
            model,
            self.prompt.to(device),
            self.num_tokens,
            sampling=self.sampling,
            generator=torch.Generator(device).manual_seed(self.seed),
            allowed=self.allowed.to(device),
        )
        return drawn.cpu()


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
    on_forecast: Callable[[np.ndarray, Tensor], None] | None = None,
) -> EnsembleScores:
    """RMSE of the ensemble mean and CRPS of each variable and lead time, over all blocks by area.

    persistence: the last input frame, of blocks that it observed; damped_persistence: its anomaly times the factor of
    the training period; climatology: for the CRPS the anomalies of frames drawn from the training period, for the RMSE
    none. max_windows: that many, evenly spread. on_forecast(bases (B,), members (B, G, M, C, *places.shape), physical)
    sees every one. model: `PredictionOnRanks` where there are several ranks, which draw together what one would draw.
    Raises ValueError where max_windows is not at least 1.
    """
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows} must be at least 1; null takes the whole split")
    count = len(dataset) if max_windows is None else min(max_windows, len(dataset))
    positions = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int))
    sums, climatology, example = _Sums(dataset), _climatology(dataset, seed), None
    chunks = np.array_split(positions, -(-positions.size * members // _SEQUENCES))
    chunks = [(seed * len(chunks) + number, chosen) for number, chosen in enumerate(chunks)]
    together = model.ranks.world if hasattr(model, "ranks") else 1
    for start in range(0, len(chunks), together):
        some = [(chosen, seed_of, dataset.frames(chosen)) for seed_of, chosen in chunks[start : start + together]]
        works = [_draw(dataset, frames, members, sampling, seed_of) for _, seed_of, frames in some]
        for (chosen, _, frames), tokens in zip(some, _computed(model, works), strict=True):
            drawn = _members(dataset, tokens, members)  # (M, B, G, K)
            _add(sums, dataset, frames, drawn, climatology)
            physical, bases = dataset.physical(drawn.transpose(0, 1), frames), dataset.base_indices[chosen]
            if on_forecast is not None:
                on_forecast(bases, physical)
            if (middle := positions[positions.size // 2]) in chosen:
                row = int(np.flatnonzero(chosen == middle)[0])
                truth = dataset.physical(frames.anomalies[:, None, dataset.input_frames :], frames)[:, :, 0]
                example = Ensemble(int(bases[row]), physical[row].clone(), truth[row].clone())
    scores, spread = sums.content()
    return EnsembleScores(scores, spread, dataset.base_indices[positions], example)


def _add(sums: _Sums, dataset: TokenWindows, frames: BlockFrames, drawn: Tensor, climatology: Tensor) -> None:
    """Adds the errors of windows by all methods. drawn: (M, B, G, K) anomalies; climatology: (m, K)."""
    normalisation, last = dataset.quantiser.normalisation, dataset.input_frames - 1
    damping = normalisation.damping[normalisation.lead_index(dataset.lead_steps)][:, dataset.blocks.variable]  # (G, K)
    truth = frames.anomalies[:, dataset.input_frames :]
    sums.add(OURS, "rmse", (drawn.mean(dim=0) - truth).square(), truth)
    sums.add(OURS, "spread", drawn.var(dim=0) * (1 + 1 / drawn.shape[0]), truth)
    sums.add(OURS, "crps", crps(drawn, truth), truth)
    now = frames.anomalies[:, last : last + 1]
    change = frames.climatology[:, last : last + 1] - frames.climatology[:, dataset.input_frames :]
    for name, forecast in (("persistence", now + change), ("damped_persistence", damping * now)):
        forecast = forecast.nan_to_num(0.0)
        sums.add(name, "rmse", (forecast - truth).square(), truth)
        sums.add(name, "crps", (forecast - truth).abs(), truth)
    sums.add("climatology", "rmse", truth.square(), truth)
    sums.add("climatology", "crps", crps(climatology[:, None, None].expand(-1, *truth.shape[:2], -1), truth), truth)


def _draw(dataset: TokenWindows, frames: BlockFrames, members: int, sampling: Sampling, seed: int) -> Draw:
    """Sequences of all members, member-major, that go on from the prefix and its first latent."""
    given, quantiser = dataset.batch(frames).inputs["tokens"], dataset.quantiser
    prompt = Sequence(given.tokens[:, : given.prefix_len + 1].repeat(members, 1), prefix_len=given.prefix_len)
    allowed = torch.arange(quantiser.vocab_size) < quantiser.bins
    return Draw(prompt, len(dataset.lead_steps) * dataset.blocks.num_tokens, sampling, seed, allowed)


def _computed(model: nn.Module, works: list[Draw]) -> list[Tensor]:
    """On all ranks, where the model is on several."""
    return model.compute(works) if hasattr(model, "compute") else [work(model) for work in works]


def _members(dataset: TokenWindows, tokens: Tensor, members: int) -> Tensor:
    """(M B, G K) tokens -> (M, B, G, K) anomalies."""
    frames = tokens.unflatten(1, (-1, dataset.blocks.num_tokens))
    return dataset.quantiser.anomalies(frames, dataset.blocks).unflatten(0, (members, -1))


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

    def content(self) -> tuple[dict, dict]:
        """Scores and spread, as in `EnsembleScores`."""
        data, scale = self.dataset.data, self.dataset.quantiser.normalisation.scale.double()
        values, spread = {}, {}
        for (method, score), errors in self.errors.items():
            mean = errors / self.weights[method, score]
            mean = (mean if score == "crps" else mean.sqrt()) * scale
            for lead, hours in enumerate(self.dataset.lead_hours):
                for channel, variable in enumerate(data.variables):
                    value = float(mean[lead, channel])
                    if not np.isfinite(value):
                        continue
                    if score == "spread":
                        spread.setdefault(variable.label, {})[f"{hours:g}"] = value
                    else:
                        by_score = values.setdefault(variable.label, {name: {} for name in SCORES})
                        by_score[score].setdefault(f"{hours:g}", {})[method] = value
        return values, spread


def format_scores(scores: dict) -> str:
    """Tables for people, one a variable and score."""
    return "\n\n".join(format_table(scores, score=score) for score in SCORES)
