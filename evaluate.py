"""Evaluates a finished run, or compares several.

python evaluate.py run=<output folder or MLflow run id>            scores, predictions.nc, report.html
python evaluate.py run=<...> weights=cos split=validation          other choices
python evaluate.py run=<...> +cp=8                                 on eight ranks
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
        text = evaluate(config) if config.compare is None else compare(config)
        if text is not None:  # on the first rank
            print(text)
    except Exception as error:
        if command_line.TRACEBACKS or not command_line.is_user_error(error):
            raise
        command_line.fail(command_line.sentence(error))


def evaluate(config: DictConfig) -> str | None:
    """Evaluates one run, writes its files and logs them; returns what a person reads."""
    from evaluation.compare import find_run
    from training.launch import launch, mesh_of
    from training.parallel import check_frames
    from training.scoring import score_on_rank
    from training.tracking_store import resolve_uri

    run = find_run(config.run, uri=resolve_uri(config.uri))
    mesh = mesh_of(config.cp, dp=1)
    if mesh.cp > 1:
        check_frames(mesh, run.config, run.layout(config.checkpoint))
    return launch(score_on_rank, config, run, mesh=mesh, trainer=config)


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
