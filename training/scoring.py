"""`evaluate.py run=...` on one of its ranks: the model of a checkpoint scored, its files written and logged."""

from __future__ import annotations

import time
import warnings

import torch
from omegaconf import DictConfig

from evaluation.run_evaluation import Choices, Findings, metrics
from evaluation.run_folder import RunFolder
from kernels import tuning
from training.checkpoints import read_normalisation
from training.devices import choose_device
from training.parallel import reshard
from training.parallel_prediction import on_all_ranks
from training.ranks import Ranks
from training.tracking_store import Store, resolve_uri


def score_on_rank(ranks: Ranks, config: DictConfig, run: RunFolder) -> str | None:
    """config: of `conf/evaluate.yaml`. What a person reads, on the first rank. Raises ValueError, OSError."""
    tuning.switch(config.autotune)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    network = run.model(config.checkpoint).to(choose_device(config.device))
    reshard(network, ranks)
    with on_all_ranks(network, ranks) as model:
        if not ranks.is_first:
            return None
        normalisation = read_normalisation(run.checkpoint(config.checkpoint))
        findings = run.task().evaluate(run, model, run.data(), normalisation, Choices.of(config))
    if config.log and run.config.tracking.enabled:
        _log(run, findings, config)
    return findings.text()


def _log(run: RunFolder, findings: Findings, config: DictConfig) -> None:
    """Adds scores and files to the run's MLflow run; a store that does not answer costs a warning."""
    tracking = run.config.tracking
    values, now = metrics(run, findings.folder), int(time.time() * 1000)
    event = {"kind": "metrics", "step": run.last_step, "time": now, "values": values}
    files = [{"kind": "artifact", "path": str(path)} for path in findings.files]
    try:
        with Store(resolve_uri(config.uri or tracking.uri), tracking.experiment).run(run.path) as stored:
            stored.send([event, *files, {"kind": "status", "value": "FINISHED"}])
    except Exception as error:  # whatever MLflow, its database or the network raise: the files are written
        warnings.warn(
            f"not logged to MLflow ({type(error).__name__}: {error}); the files are in {findings.folder}", stacklevel=2
        )
