"""The training loop: one optimiser step after another, validated, logged and saved.

Everything random in a step follows from (seed, step), and batches follow from the number of samples drawn: a resumed
run repeats exactly what an uninterrupted one does. Losses divide by the weights of all accumulated batches together.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.averaging import WeightAverage
from training.checkpoints import Checkpoints, RunFiles
from training.metrics_log import MetricsLog
from training.optimizers import build_optimizer, learning_rate
from training.profiling import profiled
from training.progress import ProgressBar

PRECISIONS = ("auto", "float32", "bf16")


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
    files: builds and reads the content of a checkpoint. Raises ValueError where a loss or gradient is not finite.
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
    ):
        self.task, self.settings, self.seed = task, settings, seed
        self.run_dir, self.files = run_dir, files
        self.device = choose_device(settings.device)
        self.precision = choose_precision(settings.precision, self.device)
        if self.device.type == "cpu":  # gradients of gathers would otherwise be summed in an order that threads decide
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        self.model = model.to(self.device)
        self.network = torch.compile(self.model) if settings.compile else self.model
        self.train_loader, self.validation_loader = train_loader, validation_loader
        self.optimizer = build_optimizer(self.model, **optimizer)
        self.schedule = dict(scheduler, max_steps=settings.max_steps, lr=optimizer.lr)
        learning_rate(0, **self.schedule)  # a wrong scheduler ends here, not after data were read
        self.average = None if settings.ema_decay is None else WeightAverage(self.model, settings.ema_decay)
        self.checkpoints = Checkpoints(run_dir / "checkpoints", keep=settings.keep)
        self.progress = Progress()

    @property
    def evaluation_model(self) -> nn.Module:
        """The averaged weights where averaging is on."""
        return self.average.model if self.average else self.model

    def resume(self, checkpoint: Path) -> None:
        """Continues from a checkpoint folder of this run."""
        state = self.files.read(checkpoint, self.model, self.average)
        self.optimizer.load_state_dict(state["optimizer"])
        if not self.settings.overfit_batches:
            self.train_loader.load_state_dict(state["loader"])
        self.progress = Progress(**state["progress"])
        self.checkpoints.recover(self.progress.step, self.progress.best_step)

    def run(self, tracker) -> Outcome:
        settings, progress = self.settings, self.progress
        log = MetricsLog(self.run_dir / "metrics.jsonl", last_step=progress.step)
        batches = self._batches()
        first, started = progress.step, time.perf_counter()
        stopped_early = self._out_of_patience()
        samples = settings.batch_size * settings.accumulate
        self.model.train()
        with (
            ProgressBar(progress.step, settings.max_steps, samples=samples, shown=settings.progress) as bar,
            profiled(self.run_dir, enabled=settings.profile) as profile_step,
        ):
            while progress.step < settings.max_steps and not stopped_early:
                progress.step += 1
                metrics = self._step(batches)
                validated = self._due(settings.validate_every)
                if validated:
                    metrics |= self.validate()
                    self._note_score(metrics["val/loss"])
                    stopped_early = self._out_of_patience()
                log.write(progress.step, metrics)
                tracker.log(progress.step, metrics)
                bar.update(metrics)
                profile_step()
                improved = validated and progress.best_step == progress.step
                if improved or stopped_early or self._due(settings.checkpoint_every or settings.validate_every):
                    self.save()
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

    def _step(self, batches) -> dict[str, float]:
        """One update of the weights from `accumulate` batches; returns what it measured."""
        step, settings = self.progress.step - 1, self.settings
        torch.manual_seed(step_seed(self.seed, step))
        drawn = [next(batches) for _ in range(settings.accumulate)]
        drawn = [self.task.augment(batch.to(self.device, non_blocking=True), self.model) for batch in drawn]
        totals = self.task.total_weights(drawn)
        losses: dict[str, Tensor] = {}
        for batch in drawn:
            with self._autocast():
                outputs = self.network(batch)
            sums = {name: weighted for name, (weighted, _) in self.task.sums(outputs, batch).items()}
            part = self.task.combine(sums, totals, batch.layout)
            part["loss"].backward()
            losses = {name: losses.get(name, 0.0) + value.detach() for name, value in part.items()}
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm or math.inf)
        self._check_finite("training loss", losses, norm)
        lr = learning_rate(step, **self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.model)
        return {"train/loss": float(losses["loss"]), "train/lr": lr, "train/gradient_norm": float(norm)}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on the validation split: the weighted mean over all its windows."""
        model = self.evaluation_model.eval()
        sums, totals = {}, {}
        for number, batch in enumerate(self.validation_loader):
            if self.settings.validation_batches is not None and number >= self.settings.validation_batches:
                break
            batch = batch.to(self.device, non_blocking=True)
            with self._autocast():
                outputs = model(batch)
            for name, (weighted, weight) in self.task.sums(outputs, batch).items():
                sums[name] = sums.get(name, 0.0) + weighted.double()
                totals[name] = totals.get(name, 0.0) + weight.double()
        self.model.train()
        losses = self.task.combine(sums, totals, batch.layout)
        self._check_finite("validation loss", losses)
        return {f"val/{name}" if name == "loss" else f"val/loss/{name}": float(losses[name]) for name in losses}

    def save(self) -> None:
        """Writes a checkpoint of the present step, unless `last` already is one."""
        progress = self.progress
        state = {
            "optimizer": self.optimizer.state_dict(),
            "loader": self.train_loader.state_dict(),
            "random": {"seed": self.seed, "step": progress.step},
            "progress": asdict(progress),
        }
        self.checkpoints.save(
            progress.step, self.files.content(self.model, self.average, state), best_step=progress.best_step
        )

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


def step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63


def choose_precision(name: str, device: torch.device) -> str:
    """float32 or bf16; `auto` is bf16 where the device has instructions for it. Raises ValueError for unknown names."""
    if name not in PRECISIONS:
        raise ValueError(f"trainer.precision={name} is unknown; use trainer.precision={', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    supported = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if supported else "float32"


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device or the CPU. Raises ValueError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"trainer.device={name} is not available here; use trainer.device=auto or cpu") from error
    return device
