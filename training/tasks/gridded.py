"""What tasks with gridded targets share: the head, error sums that can be added over batches, and the loss of them.

Letters: B batch, L lead times, C variables.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn, where

from data.batch import Batch
from data.layout import Layout, TargetLayout

if TYPE_CHECKING:
    from data.layout import Variable
    from evaluation.run_evaluation import Choices, Findings
    from evaluation.run_folder import RunFolder
    from evaluation.stacking import Stacking
    from models.encode_process_decode import EncodeProcessDecode
    from models.heads import DeterministicHead


class GriddedTask:
    """Base of tasks whose targets are fields. A subclass sets head_name, loss_name, variable_weights, lead_weights
    (one a lead time, or None: all 1) and, for the Huber loss, huber_delta; and `reads_networks`, where its models read
    what differs between the networks of data (`evaluation/networks.py`).

    query_fraction: share of the output places decoded in a training step, drawn anew for each; decoders that write all
    places at once ignore it. Outputs do not depend on each other, so this trades a noisier step for a cheaper one.
    """

    heads: tuple[str, ...] = ("deterministic",)  # what `task.head` may be
    reads_networks = False
    head_name: str
    loss_name: str
    huber_delta: float = 1.0
    query_fraction: float = 1.0
    variable_weights: Mapping[str, float]
    lead_weights: Sequence[float] | None
    stacking: str | None = None

    def head(self) -> DeterministicHead:
        from models.heads import build_head

        return build_head(self.head_name, loss=self.loss_name, huber_delta=self.huber_delta)

    def check_head(self, name: str) -> None:
        """Raises ValueError where it does not suit this task."""
        if name not in self.heads:
            raise ValueError(f"task.head={name} does not suit this task; use {' or '.join(self.heads)}")

    def check_stacking(self, name: str | None) -> None:
        """Raises ValueError where it is no baseline of this task."""
        if name is not None and name not in self.baselines:
            raise ValueError(f"task.stacking={name} is unknown; use null or one of {', '.join(self.baselines)}")

    def check_variable_weights(self, variables: Sequence[Variable]) -> None:
        """Raises ValueError where a weight is of no variable."""
        names = [variable.label for variable in variables]
        for name in self.variable_weights:
            if name not in names:
                raise ValueError(f"task.variable_weights names {name!r}; the data has {', '.join(names)}")

    def check_query_fraction(self, share: float) -> None:
        """Raises ValueError where it is no share."""
        if not 0 < share <= 1:
            raise ValueError(f"task.query_fraction={share} must be above 0 and at most 1")

    def augment(self, batch: Batch, model: EncodeProcessDecode) -> Batch:
        """A training batch as the model sees it: with the places that the step decodes, the same on all ranks that
        share a window. Draws from torch's global generator."""
        if self.query_fraction == 1:
            return batch
        return replace(batch, places=model.draw_places(self.query_fraction))

    def total_weights(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Sum of the weights of everything present in the targets of all batches, per target: (L, C)."""
        totals = {}
        for batch in batches:
            for name in batch.targets:
                target, weights = batch.wanted(name), _area_weights(batch, name)
                weights = weights.expand_as(target.values)
                if target.presence is not None:
                    weights = weights * target.presence
                totals[name] = totals.get(name, 0.0) + _all_leads(
                    weights.sum((0, *range(3, weights.ndim))), batch, name
                )
        return totals

    def sums(self, outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Area-weighted error sums and weight sums, per target: (L, C) each; 0 for lead times the batch has not."""
        head, found = self.head(), {}
        for name, output in outputs.items():
            error, weight = head.loss(output, batch.wanted(name), _area_weights(batch, name))
            found[name] = _all_leads(error, batch, name), _all_leads(weight, batch, name)
        return found

    def combine(self, sums: Mapping[str, Tensor], totals: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
        """Losses from error sums (L, C) and total weights (L, C): one a variable, and `loss`, the one to minimise.

        Means per lead time and variable, then their mean weighted by lead_weights and variable_weights; what has no
        value at all in these batches does not count.
        """
        weighted, importance, losses = 0.0, 0.0, {}
        for name, target in layout.targets.items():
            present = totals[name] > 0
            means = sums[name] / where(present, totals[name], 1.0)
            weights = self._importance(target, means) * present
            weighted, importance = weighted + (weights * means).sum(), importance + weights.sum()
            labels = [variable.label for variable in target.variables]
            losses |= dict(zip(labels, (means * present).sum(0) / present.sum(0).clamp(min=1), strict=True))
        return {"loss": weighted / importance.clamp(min=1e-30), **losses}

    def _importance(self, target: TargetLayout, like: Tensor) -> Tensor:
        """(L, C): product of lead and variable weights."""
        leads = like.new_tensor(self.lead_weights or [1.0] * len(like))
        variables = like.new_tensor([self.variable_weights.get(item.label, 1.0) for item in target.variables])
        return leads[:, None] * variables

    def whole(self, model: nn.Module) -> tuple[GriddedTask, nn.Module]:
        """The task and the model that are scored, where training sees samples of another kind."""
        return self, model

    def fit_stacking(self, model: nn.Module, data, normalisation) -> Stacking | None:
        """The share of the baseline `stacking` in our forecast, from the validation split; None without one."""
        from evaluation.stacking import fit_stacking

        return fit_stacking(model, self, data, normalisation)

    def evaluate(self, run: RunFolder, model: nn.Module, data, normalisation, choices: Choices) -> Findings:
        """Scores the model beside the baselines and writes the files of an evaluation. Raises ValueError, OSError."""
        from evaluation.run_evaluation import evaluate_windows

        return evaluate_windows(run, model, self, data, normalisation, choices)


def check_series(task: str, data) -> None:
    """Raises ValueError where data is no series of fields; says which streams of it the task does not read."""
    check_data(task, data, suits=hasattr(data, "gaps"), needs="a series of fields, like data=synthetic")
    if streams := getattr(data, "streams", None):
        warnings.warn(
            f"task={task} does not read the streams of this data ({', '.join(streams)}); task={data.task} does",
            stacklevel=3,
        )


def check_data(task: str, data, *, suits: bool, needs: str) -> None:
    """Raises ValueError where data do not suit a task, with the task that this data is made for (`data.task`)."""
    if not suits:
        raise ValueError(f"task={task} needs {needs}; with this data use task={data.task}")


def _all_leads(sums: Tensor, batch: Batch, name: str) -> Tensor:
    """Sums (l, C) over the lead times of a batch's frames, among zeros for those of other frames: (L, C)."""
    if batch.share is None:
        return sums
    held = torch.tensor(batch.share.leads(batch.layout, name), device=sums.device)
    return sums.new_zeros(len(batch.layout.targets[name].lead_times), sums.shape[1]).index_copy(0, held, sums)


def _area_weights(batch: Batch, name: str) -> Tensor:
    """Cell areas of a target, of its grid's shape or (P,) where only some places are decoded."""
    target, places = batch.targets[name], batch.places.get(name) if batch.places else None
    weights = target.grid.area_weights.to(target.values.device, target.values.dtype)
    return weights if places is None else weights.flatten()[places]
