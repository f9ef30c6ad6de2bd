"""What tests let ranks do: functions of an importable module, since ranks are other processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.batch import Batch
from models import build
from models.composition import compose
from tests.model_examples import observed_layout, tiny_batch
from training.parallel import gathering, reshard, synchronised
from training.parallel_prediction import on_all_ranks
from training.ranks import Ranks
from training.run import build_task

FRAMES = 8
TINY = [
    "model=healda_v2",
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=2",
    "model.num_heads=2",
    "model.observation_heads=2",
    f"task.frames={FRAMES}",
]


def gradients(
    ranks: Ranks, cases: Mapping[str, Sequence[str]], options: Mapping[str, object]
) -> dict[str, dict[str, Tensor]]:
    """Per case: the loss, the norm and every gradient of two accumulated random batches of the whole window."""
    return {name: _gradients(ranks, overrides, options) for name, overrides in cases.items()}


def _gradients(ranks: Ranks, overrides: Sequence[str], options: Mapping[str, object]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    overrides = [*TINY, *overrides]
    layout, task = observed_layout(frames=FRAMES), build_task(compose(overrides))
    model = build(overrides, layout)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # gates included: every branch counts
    batches = [with_gaps(tiny_batch(layout, rows=200)) for _ in range(2)]
    reshard(model, ranks, **options)
    network = synchronised(model.train(), ranks)
    torch.manual_seed(11)
    if ranks.mesh.cp > 1:
        batches = [batch.of_frames(*ranks.frames(FRAMES)) for batch in batches]
    batches = [task.augment(batch, model) for batch in batches]
    totals = ranks.sum(task.total_weights(batches))
    losses = {"loss": torch.tensor(0.0)}
    for number, batch in enumerate(batches, 1):
        with gathering(network, enabled=number == len(batches)):
            sums = {name: weighted for name, (weighted, _) in task.sums(network(batch), batch).items()}
            loss = task.combine(sums, totals, layout)["loss"]
            (loss * ranks.world).backward()
        losses["loss"] = losses["loss"] + loss.detach()
    found = ranks.sum(losses)
    found["norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return found | {name: parameter.grad for name, parameter in model.named_parameters()}


def with_gaps(batch: Batch) -> Batch:
    """A third of every target missing, NaN there."""
    targets = {}
    for name, field in batch.targets.items():
        valid = torch.rand_like(field.values) > 1 / 3
        targets[name] = replace(field, values=field.values.where(valid, torch.nan), valid=valid)
    return replace(batch, targets=targets)


@dataclass(frozen=True)
class Scaled:
    """A number times the model's weight, and which process made it."""

    number: float

    def __call__(self, model: torch.nn.Linear) -> tuple[float, int]:
        return self.number * model.weight.item(), os.getpid()


def shared_out(ranks: Ranks) -> list[tuple[float, int]] | None:
    """Five pieces of work, on the first rank."""
    network = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(network.weight, 2.0)
    with on_all_ranks(network, ranks) as model:
        return model and model.compute([Scaled(float(number)) for number in range(5)])
