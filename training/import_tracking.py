"""Sends the local log of a run whose MLflow store had failed: `python -m training.import_tracking <run folder>`."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import OmegaConf

from training.metrics_log import read_metrics
from training.tracking import BUFFER, send_local_log
from training.tracking_store import Store, resolve_uri


def import_run(run_dir: Path) -> int:
    """Number of events sent. Raises ValueError where the folder is not a run's."""
    config_file = run_dir / "config.yaml"
    if not config_file.exists():
        raise ValueError(f"{run_dir} is not the folder of a run (it has no config.yaml); give the folder of a run")
    settings = OmegaConf.load(config_file).tracking
    store = Store(resolve_uri(settings.uri), settings.experiment, run_name=settings.run_name or run_dir.name)
    with store.run(run_dir) as run:
        closed = '"status"' in (run_dir / BUFFER).read_text() if (run_dir / BUFFER).exists() else False
        sent = send_local_log(run, run_dir, read_metrics(run_dir / "metrics.jsonl"))
        if not closed:  # the process was killed before it could say how the run ended
            run.close("FINISHED" if (run_dir / "scores.json").exists() else "KILLED")
        return sent


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m training.import_tracking <run folder>")
    try:
        print(f"sent {import_run(Path(sys.argv[1]))} events")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
