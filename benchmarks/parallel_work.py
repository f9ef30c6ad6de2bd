"""What the ranks of `python -m benchmarks parallel` do: functions of an importable module, since ranks are processes.

n ranks of one context-parallel group, B samples, T frames of the window, t = T / n held here, X places, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.collectives import SentBytes, most, total
from data.batch import Batch
from models.attention.self_attention import TemporalAttention
from models.composition import build_from_config
from training.launch import threads_per_rank
from training.optimizers import build_optimizer
from training.parallel import RESHARDS, reshard, synchronised
from training.ranks import Ranks


class TrainingStep:
    """Forward, backward, averaged gradients and AdamW of one batch, of which this rank takes its frames.

    options: of `training.parallel.reshard`. sixteen_bit: compute in bf16 (autocast).
    """

    def __init__(self, ranks: Ranks, config, task, batch: Batch, *, options: Mapping = {}, sixteen_bit: bool = False):
        torch.manual_seed(0)
        self.ranks, self.task, self.sixteen_bit = ranks, task, sixteen_bit
        self.model = build_from_config(config, batch.layout)
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.05)  # gates included: every branch counts
        self.processor = self.model.processor
        frames = ranks.frames(batch.layout.frames)
        self.batch = batch.of_frames(*frames) if ranks.mesh.cp > 1 else batch
        reshard(self.model, ranks, **options)
        self.network = synchronised(self.model.train(), ranks)
        self.optimizer = build_optimizer(self.model, **config.optimizer)

    def __call__(self) -> Tensor:
        """The loss of all ranks."""
        torch.manual_seed(1)
        totals = self.ranks.sum(self.task.total_weights([self.batch]))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.sixteen_bit):
            outputs = self.network(self.batch)
        sums = {name: weighted for name, (weighted, _) in self.task.sums(outputs, self.batch).items()}
        loss = self.task.combine(sums, totals, self.batch.layout)["loss"]
        (loss * self.ranks.world).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.ranks.sum({"loss": loss})["loss"]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def counted(ranks: Ranks, config, task, batch: Batch, cases: Mapping[str, Mapping]) -> dict[str, dict]:
    """Bytes that this rank sends in one step, by case: to mix frames, and to average gradients (and sums of losses)."""
    found = {}
    for name, case in cases.items():
        step = TrainingStep(ranks, config, task, batch, **case)
        step()  # the first step also makes buckets
        with SentBytes() as counter:
            step()
        latents = step.model.encoder.latent_layout
        found[name] = {
            "sent": total(counter.sent, reduced=False),
            "reduced": total(counter.sent, reduced=True),
            "blocks": len(step.processor.blocks),
            "places": latents.num_tokens,
            "hidden_size": latents.hidden_size,
            "samples": step.batch.batch_size,
            "parameters": step.parameters,
        }
    return found


def timed_steps(ranks: Ranks, config, task, batch: Batch, steps: int) -> dict:
    """Loss of the first step; per step the wall seconds of the slowest rank and the CPU seconds of all together."""
    torch.set_num_threads(threads_per_rank(ranks.world))
    step = TrainingStep(ranks, config, task, batch)
    loss = step().item()
    wall, cpu = [], []
    for _ in range(steps):
        ranks.wait_for_all()
        started, worked = time.perf_counter(), time.process_time()
        step()
        wall.append(most(time.perf_counter() - started))
        spent = torch.tensor(time.process_time() - worked, dtype=torch.float64)
        cpu.append(ranks.sum({"cpu": spent})["cpu"].item())
    return {"loss": loss, "wall": wall, "cpu": cpu}


def timed_reshards(ranks: Ranks, shape: tuple[int, int, int, int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the slowest rank for a round trip of (B, T, X, D) float32 values, forward and with its backward pass:
    as raw collectives of the same bytes, and by each kind of reshard. They take turns."""
    batch, frames, places, hidden = shape
    values = torch.randn(batch, frames // ranks.world, places, hidden, requires_grad=True)
    message, received = torch.randn(values.numel()), torch.empty(values.numel())
    gradient = torch.randn_like(values)
    kinds = {name: kind(ranks.devices["cp"]) for name, kind in RESHARDS.items()}

    def raw(trips: int) -> None:
        for _ in range(trips):
            dist.all_to_all_single(received, message)

    def forward(kind: Callable) -> None:
        with torch.no_grad():
            kind(values, _unchanged)

    def backward(kind: Callable) -> None:
        kind(values, _unchanged).backward(gradient)
        values.grad = None

    return {
        "forward": _in_turns(
            ranks, {"raw": lambda: raw(2)} | {name: _call(forward, kind) for name, kind in kinds.items()}, rounds
        ),
        "forward+backward": _in_turns(
            ranks, {"raw": lambda: raw(4)} | {name: _call(backward, kind) for name, kind in kinds.items()}, rounds
        ),
    }


def timed_pieces(
    ranks: Ranks, shape: tuple[int, int, int, int], pieces: tuple[int, ...], rounds: int
) -> dict[int, list[float]]:
    """Seconds of the slowest rank for temporal attention, forward and backward, resharded in so many pieces."""
    batch, frames, places, hidden = shape
    values = torch.randn(batch, frames // ranks.world, places, hidden, requires_grad=True)
    gradient = torch.randn_like(values)
    layer = TemporalAttention(hidden, num_heads=4, num_frames=frames)

    def run(number: int) -> None:
        layer.resharding = RESHARDS["all_to_all"](ranks.devices["cp"], pieces=number)
        layer(values).backward(gradient)
        values.grad = None

    return _in_turns(ranks, {number: _call(run, number) for number in pieces}, rounds)


def joined_at(ranks: Ranks) -> float:
    """When the last rank had joined, as seconds since 1970."""
    ranks.wait_for_all()
    return time.time()


def _in_turns(ranks: Ranks, calls: Mapping, rounds: int) -> dict:
    for call in calls.values():
        call()
    seconds: dict = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            ranks.wait_for_all()
            started = time.perf_counter()
            call()
            seconds[name].append(most(time.perf_counter() - started))
    return seconds


def _call(function: Callable, argument: object) -> Callable[[], None]:
    return lambda: function(argument)


def _unchanged(x: Tensor) -> Tensor:
    return x
