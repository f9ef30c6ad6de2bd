"""The training loop: one optimiser step after another, validated, logged and saved.

Everything random in a step follows from (seed, step), and batches follow from the number of samples drawn: a resumed
run repeats exactly what an uninterrupted one does. Losses divide by the weights of all accumulated batches of all
ranks together. Every rank runs this loop and comes to the same decisions; the first one writes.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.averaging import WeightAverage
from training.checkpoints import Checkpoints, RunFiles
from training.devices import choose_device, choose_precision
from training.interruption import Interruption
from training.metrics_log import MetricsLog
from training.optimizers import build_optimizer, learning_rate
from training.parallel import gathering, reshard, synchronised
from training.profiling import profiled
from training.progress import ProgressBar
from training.ranks import Ranks
from training.sharding import ShardWriter, clip_gradients, is_sharded, shard


@dataclass
class Progress:
    """Where a run stands. best_score: lowest validation loss so far; stale: validations since then."""

    step: int = 0
    best_score: float = math.inf
    best_step: int | None = None
    stale: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a finished run reports. waiting: share of the time that the loop waited for data."""

    progress: Progress
    steps: int
    seconds: float
    samples_per_second: float
    waiting: float
    stopped_early: bool


class TrainingLoop:
    """Trains `model` on `task`.

    train_loader: infinite, with `state_dict`/`load_state_dict`. validation_loader: one pass each time it is iterated.
    settings, optimizer, scheduler: nodes of the configuration; settings.max_steps and validate_every are numbers.
    files: builds and reads the content of a checkpoint. ranks: who trains together with this process; loaders give its
    part of every batch. Raises ValueError where a loss or gradient is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        task,
        train_loader,
        validation_loader,
        *,
        settings,
        optimizer,
        scheduler,
        files: RunFiles,
        run_dir: Path,
        seed: int,
        ranks: Ranks,
    ):
        self.ranks = ranks
        self.task, self.settings, self.seed = task, settings, seed
        self.run_dir, self.files = run_dir, files
        self.device = choose_device(settings.device)
        self.precision = choose_precision(settings.precision, self.device)
        if self.device.type == "cpu":  # gradients of gathers would otherwise be summed in an order that threads decide
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        self.train_loader, self.validation_loader = train_loader, validation_loader
        self.schedule = dict(scheduler, max_steps=settings.max_steps, lr=optimizer.lr)
        learning_rate(0, **self.schedule)  # a wrong scheduler ends here, not after data were read
        self.average = None if settings.ema_decay is None else WeightAverage(model, settings.ema_decay)
        self.model = self._placed(model, precision=self.precision)
        if self.average:
            self._placed(self.average.model, precision="float32")
        self.optimizer = build_optimizer(self.model, **optimizer)
        self.network = synchronised(self.model, ranks)
        if settings.compile:
            self.network = torch.compile(self.network)
        self.checkpoints = Checkpoints(
            run_dir / "checkpoints",
            keep=settings.keep,
            background=settings.async_checkpoint,
            shards=ShardWriter(timeout=settings.timeout) if settings.fsdp else None,
            is_first=ranks.is_first,
        )
        self.progress = Progress()

    def _placed(self, model: nn.Module, *, precision: str) -> nn.Module:
        """The model on this rank's device, or its share of it, with frames that meet those of other ranks."""
        reshard(model, self.ranks, kind=self.settings.reshard, pieces=self.settings.reshard_pieces)
        if self.settings.fsdp:
            shard(model, self.ranks, precision=precision)
        return model.to(self.device)

    @property
    def evaluation_model(self) -> nn.Module:
        """The averaged weights where averaging is on."""
        return self.average.model if self.average else self.model

    def resume(self, checkpoint: Path) -> None:
        """Continues from a checkpoint folder of this run."""
        state = self.files.read(checkpoint, self.model, self.average, self.optimizer)
        if not self.settings.overfit_batches:
            self.train_loader.load_state_dict(state["loader"])
        self.progress = Progress(**state["progress"])
        if self.ranks.is_first:
            self.checkpoints.recover(self.progress.step, self.progress.best_step)

    def run(self, tracker) -> Outcome:
        settings, progress = self.settings, self.progress
        log = MetricsLog(self.run_dir / "metrics.jsonl", last_step=progress.step) if self.ranks.is_first else None
        batches = self._batches()
        first, started = progress.step, time.perf_counter()
        stopped_early = self._out_of_patience()
        samples = settings.batch_size * settings.accumulate
        self.model.train()
        with (
            ProgressBar(
                progress.step, settings.max_steps, samples=samples, shown=settings.progress and self.ranks.is_first
            ) as bar,
            profiled(self.run_dir, enabled=settings.profile and self.ranks.is_first) as profile_step,
            Interruption() as interruption,
        ):
            while progress.step < settings.max_steps and not stopped_early:
                progress.step += 1
                metrics, interrupted = self._step(batches, interruption)
                validated = self._due(settings.validate_every)
                if validated:
                    metrics |= self.validate()
                    self._note_score(metrics["val/loss"])
                    stopped_early = self._out_of_patience()
                if log:
                    log.write(progress.step, metrics)
                tracker.log(progress.step, metrics)
                bar.update(metrics)
                profile_step()
                improved = validated and progress.best_step == progress.step
                due = self._due(settings.checkpoint_every or settings.validate_every)
                if improved or stopped_early or interrupted or due:
                    self.save()
                if interrupted and progress.step < settings.max_steps:
                    self._leave(interruption)
        self.checkpoints.wait()
        if log:
            log.close()
        seconds = time.perf_counter() - started
        return Outcome(
            progress=progress,
            steps=progress.step - first,
            seconds=seconds,
            samples_per_second=(progress.step - first) * samples / seconds,
            waiting=self.train_loader.waited / seconds,
            stopped_early=stopped_early,
        )

    def _leave(self, interruption: Interruption) -> None:
        """Ends the run where it was saved."""
        self.checkpoints.wait()
        if self.ranks.is_first:
            command = f"python train.py resume={self.run_dir}"
            print(f"\nsaved at step {self.progress.step}; go on with: {command}", file=sys.stderr, flush=True)
        self.ranks.wait_for_all()
        interruption.end()

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.settings.max_steps

    def _batches(self):
        """Training batches for ever; with trainer.overfit_batches=n the first n of them again and again."""
        endless, number = iter(self.train_loader), self.settings.overfit_batches
        if not number:
            yield from endless
        kept = [next(endless) for _ in range(number)]
        for drawn in itertools.count((self.progress.step - 1) * self.settings.accumulate):
            yield kept[drawn % number]

    def _step(self, batches, interruption: Interruption) -> tuple[dict[str, float], bool]:
        """One update of the weights from `accumulate` batches; (what it measured, whether a rank was asked to stop)."""
        step, settings = self.progress.step - 1, self.settings
        torch.manual_seed(step_seed(self.seed, step, part=self.ranks.sample_part))
        drawn = [next(batches) for _ in range(settings.accumulate)]
        drawn = [self.task.augment(batch.to(self.device, non_blocking=True), self.model) for batch in drawn]
        totals = self.ranks.sum(self.task.total_weights(drawn))
        losses: dict[str, Tensor] = {}
        for number, batch in enumerate(drawn, 1):
            with gathering(self.network, enabled=number == len(drawn)):
                with self._autocast():
                    outputs = self.network(batch)
                sums = {name: weighted for name, (weighted, _) in self.task.sums(outputs, batch).items()}
                part = self.task.combine(sums, totals, batch.layout)
                (part["loss"] * self.ranks.world).backward()  # gradients are averaged over ranks, and losses add up
            losses = {name: losses.get(name, 0.0) + value.detach() for name, value in part.items()}
        asked = torch.tensor(float(interruption.asked is not None), device=self.device)
        losses = self.ranks.sum({**losses, "asked": asked})
        interrupted = bool(losses.pop("asked"))
        norm = clip_gradients(self.model, settings.clip_norm or math.inf)
        self._check_finite("training loss", losses, norm)
        lr = learning_rate(step, **self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.model)
        metrics = {"train/loss": float(losses["loss"]), "train/lr": lr, "train/gradient_norm": float(norm)}
        return metrics, interrupted

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on the validation split: the weighted mean over all its windows."""
        model = self.evaluation_model.eval()
        sums, totals = {}, {}
        for batch, counts in self._validation_batches():
            batch = batch.to(self.device, non_blocking=True)
            with self._autocast():
                outputs = model(batch)
            for name, (weighted, weight) in self.task.sums(outputs, batch).items():
                weighted, weight = weighted.double(), weight.double()
                sums[name] = sums.get(name, 0.0) + (weighted if counts else torch.zeros_like(weighted))
                totals[name] = totals.get(name, 0.0) + (weight if counts else torch.zeros_like(weight))
        self.model.train()
        sums, totals = self.ranks.sum(sums), self.ranks.sum(totals)
        losses = self.task.combine(sums, totals, self.validation_loader.dataset.layout)
        self._check_finite("validation loss", losses)
        return {f"val/{name}" if name == "loss" else f"val/loss/{name}": float(losses[name]) for name in losses}

    def _validation_batches(self):
        """(batch, whether it counts), equally many on every rank, because ranks compute together: one that has no
        windows left repeats its last ones."""
        loader, limit = self.validation_loader, self.settings.validation_batches
        batches, batch = iter(loader), None
        for _ in range(len(loader) if limit is None else min(limit, len(loader))):
            following = next(batches, None)
            if following is None and batch is None:
                batch = loader.dataset.__getitems__([0])
            batch = batch if following is None else following
            yield batch, following is not None

    def save(self) -> None:
        """Writes a checkpoint of the present step."""
        if not (self.ranks.is_first or is_sharded(self.model)):
            return
        progress = self.progress
        state = {
            "loader": self.train_loader.state_dict(),
            "random": {"seed": self.seed, "step": progress.step},
            "progress": asdict(progress),
        }
        files, tensors = self.files.content(self.model, self.average, self.optimizer, state)
        self.checkpoints.save(progress.step, files, tensors=tensors, best_step=progress.best_step)

    def _note_score(self, score: float) -> None:
        """Remembers the best validation."""
        progress = self.progress
        if score < progress.best_score:
            progress.best_score, progress.best_step, progress.stale = score, progress.step, 0
        else:
            progress.stale += 1

    def _out_of_patience(self) -> bool:
        return self.settings.early_stopping is not None and self.progress.stale >= self.settings.early_stopping

    def _check_finite(self, what: str, losses: dict[str, Tensor], norm: Tensor | float = 0.0) -> None:
        """Raises ValueError with the step, the variables and the last good checkpoint where something is not finite."""
        if math.isfinite(losses["loss"]) and math.isfinite(norm):
            return
        what = what if not math.isfinite(losses["loss"]) else "gradient"
        variables = [name for name in losses if name != "loss"]
        bad = [name for name in variables if not math.isfinite(losses[name])] or variables
        steps = self.checkpoints.steps()
        good = (
            f"last good checkpoint: {self.checkpoints.path(steps[-1])}" if steps else "no checkpoint was saved before"
        )
        raise ValueError(
            f"the {what} is not finite at step {self.progress.step} (variables: {', '.join(bad)}); {good}; "
            f"use a smaller rate than optimizer.lr={self.schedule['lr']:g}, or see data.inspect=true for wild values"
        )

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def step_seed(seed: int, step: int, *, part: int = 0) -> int:
    """The seed of everything random in a step on the ranks that hold one part of the samples."""
    return (seed * 1_000_003 + step + part * 2**40) % 2**63
