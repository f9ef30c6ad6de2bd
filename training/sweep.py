"""A sweep's parent run: opened by a Hydra callback before the jobs, given the best job's scores at the end."""

from __future__ import annotations

import os
import warnings

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

PARENT_VARIABLE = "HYDRASPHERE_SWEEP_RUN"
SCORE = "best/val_loss"
_store = None  # of the sweep that this process runs


def parent_run() -> str | None:
    """Id of the sweep's run, inside a sweep."""
    return os.environ.get(PARENT_VARIABLE)


class SweepParent(Callback):
    """One MLflow run a `-m` sweep. Jobs find its id in the environment and become its children."""

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        global _store
        os.environ.pop(PARENT_VARIABLE, None)
        if not config.tracking.enabled:
            return
        from training.tracking_store import Store, resolve_uri

        try:
            _store = Store(resolve_uri(config.tracking.uri), config.tracking.experiment)
            client, experiment = _store.client()
            tags = {"kind": "sweep", "output_dir": str(config.hydra.sweep.dir)}
            name = "sweep " + " ".join(config.hydra.overrides.task)
            os.environ[PARENT_VARIABLE] = client.create_run(experiment, tags=tags, run_name=name[:250]).info.run_id
        except Exception as error:  # the jobs then run without a parent
            warnings.warn(f"the sweep has no parent run in MLflow: {error}", stacklevel=2)


def finish(*, succeeded: bool) -> None:
    """Copies `best/*` and `test/*` of the best job to the parent run and closes it; nothing where no sweep is open.

    succeeded: whether all jobs ended well. Called by the script: Hydra leaves its own callback out when a job fails.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or _store is None:
        return
    try:
        client, experiment = _store.client()
        children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'", max_results=1000)
        scored = [child for child in children if SCORE in child.data.metrics]
        if scored:
            best = min(scored, key=lambda child: child.data.metrics[SCORE])
            client.set_tag(parent, "best_run", best.info.run_id)
            for key, value in best.data.metrics.items():
                if key.startswith(("best/", "test/")):
                    client.log_metric(parent, key, value)
        client.set_terminated(parent, "FINISHED" if succeeded else "FAILED")
    except Exception as error:
        warnings.warn(f"the sweep's parent run could not be completed: {error}", stacklevel=2)
