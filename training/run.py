"""One training run from a composed configuration: what is built, where it writes, what it reports at the end."""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from data.layout import Layout
from data.loading import BatchLoader, SharedFrames
from kernels import tuning
from models.composition import build_from_config
from training import environment
from training.checkpoints import RunFiles, check_layout, load_weights, read_normalisation
from training.cluster import cores_per_rank, started_again
from training.devices import choose_device, choose_precision
from training.job import Job
from training.loop import Outcome, TrainingLoop
from training.parallel_prediction import on_all_ranks
from training.ranks import Mesh, Ranks
from training.run_folder import OVERRIDES, last_checkpoint
from training.sizes import TooLarge, batch_size, fitted
from training.tracking import NoTracker, build_tracker
from training.tracking_store import resolve_uri

if TYPE_CHECKING:
    from evaluation.run_evaluation import Findings

PARTS = ("encoder", "processor", "decoder")
UNVARIED = (*(f"model.{part}." for part in PARTS), "data.path", "data.inspect", "data.recommended", "trainer.progress")
DEFAULT_LR = 1e-3
VALIDATIONS = 10  # over the budget, where trainer.validate_every is not given


def build_data(config: DictConfig):
    """The data set of `config.data`. Raises ValueError or OSError where its files cannot be understood."""
    return instantiate(config.data, _convert_="all")


def build_task(config: DictConfig):
    return instantiate(config.task, _convert_="all")


def build_model(config: DictConfig, layout: Layout) -> nn.Module:
    """The model with the random weights of `seed`."""
    torch.manual_seed(config.seed)
    return build_from_config(config, layout)


def complete(config: DictConfig, data) -> None:
    """Fills in what depends on the data: the budget, and how often to validate."""
    trainer = config.trainer
    if trainer.max_steps is None:
        trainer.max_steps = data.recommended.get("max_steps", 2000)
    trainer.batch_size = batch_size(config)
    if config.optimizer.lr is None:
        config.optimizer.lr = float(data.recommended.get("lr", DEFAULT_LR))
    trainer.precision = choose_precision(trainer.precision, choose_device(trainer.device))
    if trainer.validate_every is None:
        trainer.validate_every = max(1, trainer.max_steps // VALIDATIONS)
    for name in (
        "max_steps",
        "batch_size",
        "accumulate",
        "validate_every",
        "checkpoint_every",
        "early_stopping",
        "num_threads",
    ):
        if trainer[name] is not None and trainer[name] < 1:
            raise ValueError(f"trainer.{name}={trainer[name]} must be at least 1")
    if trainer.num_threads is not None:
        torch.set_num_threads(trainer.num_threads)


def train_on_rank(ranks: Ranks, config: DictConfig, job_here: Job, data, task) -> str | None:
    """Trains and scores, on one of the ranks; what a person reads at the end, on the first one."""
    job = ranks.from_first(lambda: job_here)  # under torchrun Hydra gives every process a folder of its own
    layout = task.layout(data)
    run = Run(config, data, task, build_model(config, layout), layout=layout, job=job, ranks=ranks)
    with run.tracked():
        outcome = run.train()
        findings = run.score()
    return run.summary(outcome, findings) if ranks.is_first else None


class Run:
    """Everything of one run, on one of its ranks; the first writes its files. layout: what the model was built for.

    Nothing is written before data, statistics and loaders exist. Raises ValueError where a setting does not fit them,
    or data do not fit the checkpoint to go on from.
    """

    def __init__(self, config: DictConfig, data, task, model: nn.Module, *, layout: Layout, job: Job, ranks: Ranks):
        complete(config, data)
        trainer = config.trainer
        tuning.switch(trainer.autotune)
        if config.tracking.enabled:
            resolve_uri(config.tracking.uri)
        self.config, self.data, self.task, self.job, self.ranks = config, data, task, job, ranks
        self.directory = job.directory
        goes_on = config.resume or (started_again() and (self.directory / "checkpoints" / "last").is_dir())
        checkpoint = last_checkpoint(self.directory) if goes_on else None
        if checkpoint:
            check_layout(checkpoint, layout)
        self.normalisation = ranks.from_first(lambda: read_normalisation(checkpoint) if checkpoint else task.fit(data))
        train_set, validation_set = (task.dataset(data, split, self.normalisation) for split in ("train", "validation"))
        self.loop = TrainingLoop(
            model,
            task,
            self._loader(train_set, seed=config.seed),
            self._loader(validation_set, shuffle=False),
            settings=trainer,
            optimizer=config.optimizer,
            scheduler=config.scheduler,
            files=RunFiles(self._description(layout), self.normalisation),
            run_dir=self.directory,
            seed=config.seed,
            ranks=ranks,
        )
        if checkpoint:
            self.loop.resume(checkpoint)

    def _loader(self, dataset, **settings) -> BatchLoader:
        """This rank's part of every batch: its samples, and of them its frames."""
        ranks = self.ranks
        if ranks.mesh.cp > 1:
            dataset = SharedFrames(dataset, *ranks.frames(dataset.layout.frames))
        return BatchLoader(
            dataset,
            batch_size=self.config.trainer.batch_size // ranks.mesh.dp,
            num_workers=min(self.data.num_workers, cores_per_rank(ranks.world)) if ranks.world > 1 else None,
            pin=choose_device(self.config.trainer.device).type == "cuda",
            rank=ranks.sample_part,
            world=ranks.mesh.dp,
            **settings,
        )

    def _description(self, layout) -> dict:
        """What `models.composition.load` needs to build the same model again."""
        return {
            "model": OmegaConf.to_container(self.config.model, resolve=True),
            "task": OmegaConf.to_container(self.config.task, resolve=True),
            "layout": layout.to_dict(),
        }

    @contextmanager
    def tracked(self):
        """Writes what the run is made of, and keeps its MLflow run open until the end, however it ends."""
        if not self.ranks.is_first:
            self.tracker = NoTracker()
            yield
            return
        self._write_files()
        job = self.job
        self.tracker = build_tracker(self.config.tracking, self.directory, run_name=job.name, parent=job.parent)
        self.tracker.tags(run_tags(self.config, job))
        self.tracker.params(run_parameters(self.config, job))
        status = "FAILED"
        try:
            yield
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            for name in (
                "config.yaml",
                "overrides.txt",
                "environment.txt",
                "metrics.jsonl",
                "scores.json",
                "report.html",
            ):
                self.tracker.artifact(self.directory / name)
            self.tracker.finish(status)

    def _write_files(self) -> None:
        overrides = [item for item in self.job.overrides if not item.startswith(("resume=", "model/size="))]
        overrides.append(f"model/size={self.config.model.size}")  # what was automatic stays on another machine
        contents = {
            "config.yaml": OmegaConf.to_yaml(self.config, resolve=True),
            OVERRIDES: "".join(f"{item}\n" for item in overrides),
            "environment.txt": environment.describe(),
        }
        for name, text in contents.items():
            (self.directory / name).write_text(text)

    def train(self) -> Outcome:
        outcome = self.loop.run(self.tracker)
        progress = outcome.progress
        figures = {
            "best/val_loss": progress.best_score,
            "best/step": progress.best_step,
            "samples_per_second": outcome.samples_per_second,
            "seconds_per_step": outcome.seconds / max(1, outcome.steps),
            "waiting_for_data": outcome.waiting,
            "peak_memory_mb": peak_memory_mb(),
            "parameters": sum(parameter.numel() for parameter in self.loop.model.parameters()),
        }
        self.tracker.log(progress.step, figures)
        if self.ranks.is_first:  # what a comparison of runs reads where there is no tracking store
            (self.directory / "outcome.json").write_text(json.dumps(figures, indent=1) + "\n")
        return outcome

    def score(self) -> Findings | None:
        """Scores of the best checkpoint on the test split, beside the baselines, with the files of an evaluation; on
        the first rank."""
        network, best = self.loop.evaluation_model, self.directory / "checkpoints" / "best"
        self.ranks.wait_for_all()  # the first one has written it
        load_weights(network, best)
        with on_all_ranks(network, self.ranks) as model:
            return self._scored(model, best) if self.ranks.is_first else None

    def _scored(self, model: nn.Module, best: Path) -> Findings:
        from evaluation.run_evaluation import Choices, metrics
        from evaluation.run_folder import RunFolder

        if self.task.stacking is not None:
            stacking = self.task.fit_stacking(model, self.data, self.normalisation)
            if stacking is not None:
                stacking.write(best)
        run, report = RunFolder(self.directory), self.config.report
        choices = Choices(report=report, predictions=report)
        findings = self.task.evaluate(run, model, self.data, self.normalisation, choices)
        self.tracker.log(self.loop.progress.step, metrics(run, findings.folder))
        return findings

    def summary(self, outcome: Outcome, findings: Findings) -> str:
        """What a person reads at the end: what happened, the scores, and what to type next."""
        page = self.directory / "report.html"
        report = f"maps, spectra, scores by region: {page}\n\n" if page.is_file() else ""
        progress, trained = outcome.progress, f"{outcome.progress.step} steps"
        if outcome.stopped_early:
            trained += f" (stopped early, {progress.stale} validations without improvement)"
        return (
            f"{trained}, best at step {progress.best_step} with validation loss {progress.best_score:.4f}; "
            f"{outcome.seconds:.0f} s, {outcome.samples_per_second:.0f} samples/s, "
            f"{outcome.waiting:.1%} of the time waiting for data\n\n"
            f"{findings.table}\n\n"
            f"{report}"
            f"next:  python evaluate.py run={self.directory} checkpoint=last    another checkpoint\n"
            f"       make ui    every run in MLflow\n"
            f"       python train.py -m optimizer.lr=1e-3,3e-4    a sweep"
        )


def describe(config: DictConfig, data, task, layout: Layout, mesh: Mesh, *, automatic: bool) -> str:
    """`dry_run=true`: parts, parameters and shapes for one training batch, and the memory a step needs.

    A model that does not fit this machine, or whose data are elsewhere, is made on the meta device. automatic: whether
    its size was left open.
    """
    from models.summary import describe as describe_parts
    from models.summary import outline

    reason = "" if data.available else "the data's files are not given"
    try:
        config = fitted(config, layout, mesh, automatic=automatic)
    except TooLarge as error:
        reason = str(error)
    complete(config, data)
    trainer = config.trainer
    if reason:
        with torch.device("meta"):
            model = build_model(config, layout)
        return f"{outline(model)}\nbudget     {trainer.max_steps} steps\nnot here   {reason}"
    model = build_model(config, layout)
    dataset = task.dataset(data, "train", task.fit(data))
    batch = dataset.__getitems__([number % len(dataset) for number in range(trainer.batch_size)])
    return (
        f"{describe_parts(model, batch)}\n"
        f"batch      {trainer.batch_size} windows of {len(dataset)}\n"
        f"budget     {trainer.max_steps} steps of {trainer.batch_size * trainer.accumulate} windows"
    )


def run_tags(config: DictConfig, job: Job) -> dict[str, str]:
    choices = job.choices
    return {
        "model": choices["model"],
        **{part: choices[f"model/{part}"] for part in PARTS},
        # Scalars: model.attention=x leaves the group's choice as it was.
        "attention": config.model.attention,
        "size": config.model.size,
        "data": choices["data"],
        "task": choices["task"],
        "git_commit": environment.git_commit(),
        "command": job.command,
        "output_dir": str(job.directory.absolute()),
    }


def run_parameters(config: DictConfig, job: Job) -> dict[str, str]:
    """What a user varies, as flat names with dots: the scalars of every group, and options of parts that were typed."""
    typed = {item.split("=")[0].lstrip("+") for item in job.overrides}
    flat = {"seed": config.seed, **{f"model.{part}": job.choices[f"model/{part}"] for part in PARTS}}

    def walk(node: dict, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}.{key}"
            if isinstance(value, dict):
                walk(value, name)
            elif value is not None and (name in typed or not name.startswith(UNVARIED)) and key != "_target_":
                flat[name] = value

    for group in ("model", "task", "data", "optimizer", "scheduler", "trainer"):
        walk(OmegaConf.to_container(config[group], resolve=True), group)
    return flat


def peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
