"""Predictions by all ranks for an evaluation that only the first one runs.

The first rank calls `predict` as if the model were here; every rank computes its frames, and the first one joins them.
`compute` shares out work that each rank does alone. The others serve until it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batch import Batch
from models.heads import Prediction
from training.ranks import Ranks


class PredictionOnRanks(nn.Module):
    """model: on this rank's device, resharded. ranks: more than one."""

    def __init__(self, model: nn.Module, ranks: Ranks):
        super().__init__()
        self.model, self.ranks = model, ranks
        self.group = ranks.patient  # between two batches the first rank may fit and score baselines

    def predict(self, batch: Batch) -> dict[str, Prediction]:
        """On the first rank only: what `EncodeProcessDecode.predict` of the whole batch gives."""
        held = [self._held(batch.to("cpu"), part) for part in range(self.ranks.mesh.cp)]
        made = self._computed([_Values(held[rank % self.ranks.mesh.cp]) for rank in range(self.ranks.world)])
        return {name: _joined(name, batch, held, made) for name in batch.targets}

    def compute(self, works: Sequence[Callable[[nn.Module], object]]) -> list:
        """On the first rank only: work(model) of each, on one rank or another."""
        made = []
        for start in range(0, len(works), self.ranks.world):
            some = list(works[start : start + self.ranks.world])
            made += self._computed(some + some[-1:] * (self.ranks.world - len(some)))[: len(some)]
        return made

    def serve(self) -> None:
        """On the other ranks: computes what the first one asks for until it is done."""
        while self._computed(None) is not None:
            pass

    def finish(self) -> None:
        """Lets the others go."""
        dist.scatter_object_list([None], [None] * self.ranks.world, src=0, group=self.group)

    def _held(self, batch: Batch, part: int) -> Batch:
        count = batch.layout.frames // self.ranks.mesh.cp
        return batch.of_frames(part * count, count) if self.ranks.mesh.cp > 1 else batch

    @torch.inference_mode()
    def _computed(self, works: list[Callable[[nn.Module], object]] | None) -> list | None:
        """What all ranks made of their work, on the first one ([] on others); None: there is nothing to do."""
        mine = [None]
        dist.scatter_object_list(mine, works, src=0, group=self.group)
        if mine[0] is None:
            return None
        made = mine[0](self.model)
        found = [None] * self.ranks.world if self.ranks.is_first else None
        dist.gather_object(made, found, dst=0, group=self.group)
        return found or []


@dataclass(frozen=True)
class _Values:
    """The predicted values of a batch, by target, on the CPU."""

    batch: Batch

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        return {name: item.point.values.cpu() for name, item in model.predict(self.batch.to(device)).items()}


@contextmanager
def on_all_ranks(model: nn.Module, ranks: Ranks):
    """Yields the model to evaluate with on the first rank, and None, once that is done, on the others."""
    if ranks.world == 1:
        yield model
        return
    shared = PredictionOnRanks(model.eval(), ranks)
    if not ranks.is_first:
        shared.serve()
        yield None
        return
    yield shared
    shared.finish()


def _joined(name: str, batch: Batch, held: list[Batch], made: list[dict[str, Tensor]]) -> Prediction:
    """The prediction of all times, from the values of the frames of each rank."""
    target = batch.targets[name]
    values = target.values.new_empty(target.values.shape, dtype=made[0][name].dtype)
    for part, found in zip(held, made, strict=False):  # later ranks made the same of the same frames
        leads = slice(None) if part.share is None else part.share.leads(batch.layout, name)
        values[:, leads] = found[name].to(values.device)
    return Prediction(point=replace(target, values=values, scale=None, offset=None, reference=None, valid=None))
