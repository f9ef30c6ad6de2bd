"""Evaluates a finished run, or compares several.

python evaluate.py run=<output folder or MLflow run id>            scores, predictions.nc, report.html
python evaluate.py run=<...> weights=cos split=validation          other choices
python evaluate.py compare=<sweep folder or MLflow experiment>     one table: CSV, Markdown, HTML
"""

from dataclasses import fields
from pathlib import Path

import hydra
from omegaconf import DictConfig

from conf import schema
from training import command_line

schema.register()


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="evaluate")
def main(config: DictConfig) -> None:
    try:
        if (config.run is None) == (config.compare is None):
            raise ValueError("give either run=<output folder or MLflow run id> or compare=<sweep folder or experiment>")
        if unknown := config.keys() - {item.name for item in fields(schema.Evaluate)}:
            raise ValueError(f"there is no option {min(unknown)}; python evaluate.py --help lists the options")
        if config.num_threads is not None and config.num_threads < 1:
            raise ValueError(f"num_threads={config.num_threads} must be at least 1; null takes torch's default")
        print(evaluate(config) if config.compare is None else compare(config))
    except Exception as error:
        if command_line.TRACEBACKS or not command_line.is_user_error(error):
            raise
        command_line.fail(command_line.sentence(error))


def evaluate(config: DictConfig) -> str:
    """Evaluates one run, writes its files and logs them; returns what a person reads."""
    import torch

    from evaluation.compare import find_run
    from evaluation.run_evaluation import Choices
    from training.checkpoints import read_normalisation
    from training.devices import choose_device
    from training.tracking_store import resolve_uri

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    run = find_run(config.run, uri=resolve_uri(config.uri))
    model = run.model(config.checkpoint).to(choose_device(config.device))
    normalisation = read_normalisation(run.checkpoint(config.checkpoint))
    findings = run.task().evaluate(run, model, run.data(), normalisation, Choices.of(config))
    if config.log and run.config.tracking.enabled:
        log(run, findings, config)
    return findings.text()


def log(run, findings, config: DictConfig) -> None:
    """Adds scores and files to the run's MLflow run; a store that does not answer costs a warning."""
    import time
    import warnings

    from evaluation.run_evaluation import metrics
    from training.tracking_store import Store, resolve_uri

    tracking = run.config.tracking
    event = {
        "kind": "metrics",
        "step": run.last_step,
        "time": int(time.time() * 1000),
        "values": metrics(run, findings.folder),
    }
    files = [{"kind": "artifact", "path": str(path)} for path in findings.files]
    try:
        with Store(resolve_uri(config.uri or tracking.uri), tracking.experiment).run(run.path) as stored:
            stored.send([event, *files, {"kind": "status", "value": "FINISHED"}])
    except Exception as error:  # whatever MLflow, its database or the network raise: the files are written
        warnings.warn(
            f"not logged to MLflow ({type(error).__name__}: {error}); the files are in {findings.folder}", stacklevel=2
        )


def compare(config: DictConfig) -> str:
    """Compares runs, writes the table; returns it with the places of its files."""
    from evaluation.compare import Comparison, find_runs
    from training.tracking_store import resolve_uri

    runs = find_runs(config.compare, uri=resolve_uri(config.uri))
    comparison = Comparison.of(runs)
    single = isinstance(config.compare, str) and Path(config.compare).is_dir()
    written = comparison.write(Path(config.output or (config.compare if single else ".")))
    return f"{comparison.text()}\n\nwritten: {', '.join(map(str, written))}"


if __name__ == "__main__":
    command_line.run(main)
