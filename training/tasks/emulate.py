"""Emulation: the state of a forced system and what forces it in, the next state out, and so on step by step.

Letters: B batch, L lead times, C variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import Batch
from data.layout import Layout, TargetLayout, Variable
from training.tasks.gridded import GriddedTask

if TYPE_CHECKING:
    from data.datasets.emulation import EmulationDataset
    from data.datasets.forced_data import ForcedData
    from data.forced_normalisation import ForcedNormalisation
    from evaluation.baselines import Situation
    from evaluation.run_evaluation import Choices, Findings
    from evaluation.run_folder import RunFolder
    from models.encode_process_decode import EncodeProcessDecode

REFERENCES = ("persistence", "damped_persistence")


class EmulateTask(GriddedTask):
    """Emulates a series that streams force (`data.datasets.forced_data.ForcedData`), one step of the data at a time.

    input_frames: states that a step reads. rollout_steps: steps of a training sample, its loss their mean; each reads
        the state that the one before predicted. score_steps: lead times of the evaluation, in steps of the data.
    stream_frames: frames of the streams that a step reads, the last of them stream_ahead steps after its last state.
    reference: what a step's output is added to, the anomaly of the state before (persistence) or what is left of it on
        average (damped_persistence).
    loss: mse, l1 or huber of what persistence leaves at each step, weighted by exact cell area and, with depth_weights,
        by the thickness of the layer that a level stands for. variable_weights, lead_weights: as of `task=forecast`.
    input_noise: standard deviation, in normalised units, of noise on the states that training starts from.
    Raises ValueError where a value is not allowed.
    """

    stacking = None
    reads_networks = True

    def __init__(
        self,
        *,
        input_frames: int,
        rollout_steps: int,
        score_steps: Sequence[int],
        stream_frames: int,
        stream_ahead: int,
        reference: str,
        head: str,
        loss: str,
        huber_delta: float = 1.0,
        depth_weights: bool = True,
        variable_weights: Mapping[str, float] | None = None,
        lead_weights: Sequence[float] | None = None,
        input_noise: float = 0.0,
    ):
        for name, number in dict(
            input_frames=input_frames, rollout_steps=rollout_steps, stream_frames=stream_frames
        ).items():
            if number < 1:
                raise ValueError(f"task.{name}={number} must be at least 1")
        if not 0 <= stream_ahead <= 1:
            raise ValueError(
                f"task.stream_ahead={stream_ahead} must be 0 (the last state's time) or 1 (the next one's)"
            )
        score_steps = tuple(score_steps)
        if not score_steps or min(score_steps) < 1 or list(score_steps) != sorted(set(score_steps)):
            raise ValueError(
                f"task.score_steps={list(score_steps)} must be increasing whole steps of at least 1, like "
                "task.score_steps=[1,5,20]"
            )
        if reference not in REFERENCES:
            raise ValueError(f"task.reference={reference} is unknown; use one of {', '.join(REFERENCES)}")
        if lead_weights is not None and (
            len(lead_weights) != rollout_steps or min(lead_weights) < 0 or max(lead_weights) == 0
        ):
            raise ValueError(
                f"task.lead_weights={list(lead_weights)} must be {rollout_steps} numbers of 0 or more, one a step of "
                "task.rollout_steps, and not all 0"
            )
        if input_noise < 0:
            raise ValueError(f"task.input_noise={input_noise} must be 0 or more")
        self.check_head(head)
        self.input_frames, self.rollout_steps, self.score_steps = input_frames, rollout_steps, score_steps
        self.stream_frames, self.stream_ahead, self.reference = stream_frames, stream_ahead, reference
        self.head_name, self.loss_name, self.huber_delta = head, loss, huber_delta
        self.depth_weights, self.variable_weights = depth_weights, dict(variable_weights or {})
        self.lead_weights = None if lead_weights is None else tuple(lead_weights)
        self.input_noise = input_noise
        self.lead_steps = tuple(range(1, rollout_steps + 1))

    # Data

    def layout(self, data: ForcedData) -> Layout:
        """What the model reads and predicts. Raises ValueError where the data has no streams, splits are shorter than
        rollouts or weights do not fit."""
        if not hasattr(data, "streams"):
            raise ValueError(
                "task=emulate needs a series and streams that force it; use data=two_resolution_ocean, data=forced, or "
                "task=forecast"
            )
        self.check_variable_weights(data.variables)
        from data.datasets.emulation import emulation_layout, frames_in_a_row

        for split, name, steps in (("train", "rollout", (self.rollout_steps,)), ("test", "score", self.score_steps)):
            there, needed = frames_in_a_row(data, split), self.input_frames + max(steps)
            if there < needed:
                raise ValueError(
                    f"task.{name}_steps={steps[0] if name == 'rollout' else list(steps)} and task.input_frames="
                    f"{self.input_frames} need {needed} frames in a row, and the {split} split has {there}; shorten "
                    f"task.{name}_steps or widen data.split.{split}"
                )

        return emulation_layout(
            data, input_frames=self.input_frames, lead_steps=self.lead_steps, stream_frames=self.stream_frames
        )

    def fit(self, data: ForcedData) -> ForcedNormalisation:
        """Scale, climatology, damping and residual scale of the training range, of the streams as well."""
        from data.forced_normalisation import ForcedNormalisation

        return ForcedNormalisation.fit(data, lead_steps=sorted({1, *self.lead_steps, *self.score_steps}))

    def dataset(self, data: ForcedData, split: str, normalisation: ForcedNormalisation) -> EmulationDataset:
        from data.datasets.emulation import EmulationDataset

        return EmulationDataset(
            data,
            split,
            normalisation,
            input_frames=self.input_frames,
            lead_steps=self.lead_steps,
            reference=self.reference,
            stream_frames=self.stream_frames,
            ahead=self.stream_ahead,
        )

    # Evaluation

    @property
    def baselines(self) -> Mapping[str, type]:
        """What rollouts are compared with."""
        from evaluation.baselines import BASELINES

        return {name: BASELINES[name] for name in ("persistence", "climatology", "damped_persistence")}

    def situation(self, dataset: EmulationDataset, positions: np.ndarray, batch: Batch) -> tuple[Situation, Tensor]:
        """(what baselines may know, truth (B, L, C, *grid.shape), NaN where not scored) of the samples `positions`."""
        from evaluation.baselines import situation

        bases = dataset.base_indices[positions]
        known, truth = situation(dataset.data, dataset.normalisation, bases, dataset.lead_steps)
        return known, truth.where(dataset.data.domain, torch.nan)

    def evaluate(self, run: RunFolder, model: nn.Module, data, normalisation, choices: Choices) -> Findings:
        """Scores rollouts at score_steps, and one that is as long as the split. Raises ValueError, OSError."""
        from data.datasets.emulation import frames_in_a_row
        from evaluation.long_rollout import long_rollout
        from evaluation.run_evaluation import evaluate_windows, output_folder

        scored, longest = copy(self), copy(self)
        scored.lead_steps = self.score_steps
        steps = max(1, frames_in_a_row(data, choices.split) - self.input_frames)
        longest.lead_steps = tuple(range(1, steps + 1))
        rollout = long_rollout(model, longest.dataset(data, choices.split, normalisation))
        findings = evaluate_windows(run, model, scored, data, normalisation, choices, sections=rollout.section())
        rollout.write(output_folder(run, choices))
        return replace(findings, table=f"{findings.table}\n\n{rollout.table()}")

    # Training

    def augment(self, batch: Batch, model: EncodeProcessDecode) -> Batch:
        """A training batch as the model sees it: noise on the states. Draws from torch's global generator."""
        if self.input_noise == 0:
            return batch
        states = batch.inputs["prognostic"]
        noisy = replace(states, values=states.values + self.input_noise * torch.randn_like(states.values))
        return replace(batch, inputs={**batch.inputs, "prognostic": noisy})

    def _importance(self, target: TargetLayout, like: Tensor) -> Tensor:
        importance = super()._importance(target, like)
        if not self.depth_weights:
            return importance
        shares = layer_shares(target.variables)
        return importance * like.new_tensor([shares.get(item.label, 1.0) for item in target.variables])


def layer_shares(variables: Sequence[Variable]) -> dict[str, float]:
    """{label: weight} of variables with levels, by the thickness of their layers (edges halfway between the levels and
    the surface at 0), mean 1 over the levels of a name."""
    shares: dict[str, float] = {}
    for name in {item.name for item in variables}:
        levels = sorted((item for item in variables if item.name == name and item.level is not None), key=_depth)
        if len(levels) < 2:
            continue
        depths = np.array([_depth(item) for item in levels])
        edges = np.concatenate([[0.0], (depths[1:] + depths[:-1]) / 2, [depths[-1] + (depths[-1] - depths[-2]) / 2]])
        thickness = np.diff(edges)
        shares |= dict(zip((item.label for item in levels), (thickness / thickness.mean()).tolist(), strict=True))
    return shares


def _depth(variable: Variable) -> float:
    return abs(variable.level)
