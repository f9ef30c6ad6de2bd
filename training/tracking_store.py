"""The MLflow store: addressed, created once under a file lock, and one run of it that accepts events."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

from training.environment import REPOSITORY

LOCK_SECONDS = 120  # creating the database takes about 7 s, and eight processes may wait for it
BUSY_SECONDS = 20  # what MLflow waits, too
MAX_METRICS, MAX_PARAMS, MAX_TAGS = 1000, 100, 100  # limits of one batch
MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 6000, 5000


def resolve_uri(uri: str | None) -> str:
    """The store's address; None is `mlflow.db` at the root of the repository. Raises ValueError for folders."""
    uri = uri or f"sqlite:///{REPOSITORY / 'mlflow.db'}"
    if uri.startswith("file:") or "://" not in uri:
        raise ValueError(
            f"tracking.uri={uri} is a folder, which MLflow no longer writes to; "
            "use tracking.uri=sqlite:////absolute/path/mlflow.db, a server's http address, or tracking.enabled=false"
        )
    return uri


class Store:
    """An experiment in a store. Nothing is imported or opened before `client` or `run` is called."""

    def __init__(self, uri: str, experiment: str, *, run_name: str | None = None, parent: str | None = None):
        self.uri, self.experiment, self.run_name, self.parent = uri, experiment, run_name, parent

    def client(self):
        """(client, experiment id). Creates both once, under a lock: processes that race for it ruin the database."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is down must not hold a run's end
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        from filelock import FileLock
        from mlflow import MlflowClient

        if not self.uri.startswith("sqlite:///"):
            client = MlflowClient(tracking_uri=self.uri)
            return client, self._experiment_id(client, None)
        database = Path(self.uri.removeprefix("sqlite:///")).absolute()
        database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{database}.lock", timeout=LOCK_SECONDS):
            _require_writable(database)
            client = MlflowClient(tracking_uri=self.uri)
            return client, self._experiment_id(client, (database.parent / "mlruns" / self.experiment).as_uri())

    def _experiment_id(self, client, artifacts: str | None) -> str:
        found = client.get_experiment_by_name(self.experiment)
        return found.experiment_id if found else client.create_experiment(self.experiment, artifact_location=artifacts)

    @contextmanager
    def run(self, run_dir: Path, *, system_metrics: bool = False):
        """A `StoredRun` for the folder: the run named in its `mlflow_run_id`, else a new one."""
        from mlflow.exceptions import MlflowException

        client, experiment_id = self.client()
        id_file, run_id = run_dir / "mlflow_run_id", None
        if id_file.exists():
            run_id = id_file.read_text().strip()
            try:
                client.update_run(run_id, status="RUNNING")
            except MlflowException:  # another store than the one this folder was tracked in
                run_id = None
        if run_id is None:
            tags = {"mlflow.parentRunId": self.parent} if self.parent else {}
            run_id = client.create_run(experiment_id, tags=tags, run_name=self.run_name).info.run_id
            id_file.write_text(run_id + "\n")
        monitor = None
        if system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor = SystemMetricsMonitor(run_id, tracking_uri=self.uri)
            monitor.start()
        try:
            yield StoredRun(client, run_id, run_dir)
        finally:
            if monitor is not None:
                monitor.finish()


class StoredRun:
    """One run in the store."""

    def __init__(self, client, run_id: str, run_dir: Path):
        self.client, self.run_id, self.run_dir = client, run_id, run_dir
        history = client.get_metric_history(run_id, "train/loss")
        self.recorded_step = max((metric.step for metric in history), default=-1)

    def send(self, events: list[dict]) -> None:
        """Metrics in batches, parameters that are not there yet (they cannot be changed), tags, files, the status.

        Training metrics of steps that the store held when it was opened are left out.
        """
        from mlflow.entities import Metric, Param, RunTag

        metrics, params, tags = [], {}, {}
        for event in events:
            if event["kind"] == "metrics" and (
                "train/loss" not in event["values"] or event["step"] > self.recorded_step
            ):
                metrics += [
                    Metric(_key(key), float(value), event["time"], event["step"])
                    for key, value in event["values"].items()
                ]
            elif event["kind"] == "params":
                params |= {_key(key): value for key, value in event["values"].items()}
            elif event["kind"] == "tags":
                tags |= event["values"]
        if params:
            present = self.client.get_run(self.run_id).data.params
            params = {key: value for key, value in params.items() if key not in present}
        for chunk in _chunks(metrics, MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=chunk)
        for chunk in _chunks([Param(key, value[:MAX_PARAM_LENGTH]) for key, value in params.items()], MAX_PARAMS):
            self.client.log_batch(self.run_id, params=chunk)
        for chunk in _chunks([RunTag(key, value[:MAX_TAG_LENGTH]) for key, value in tags.items()], MAX_TAGS):
            self.client.log_batch(self.run_id, tags=chunk)
        for event in events:
            if event["kind"] == "artifact" and (self.run_dir / event["path"]).exists():
                self.client.log_artifact(self.run_id, str(self.run_dir / event["path"]))
            elif event["kind"] == "status":
                self.close(event["value"])

    def close(self, status: str) -> None:
        self.client.set_terminated(self.run_id, status)


def _require_writable(database: Path) -> None:
    """Raises sqlite3.Error where MLflow would try again for minutes: no database, no access, locked for long."""
    with closing(sqlite3.connect(database, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


def _key(name: str) -> str:
    """MLflow accepts only these characters in names; `t@850` becomes `t_850`."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _chunks(items: list, size: int):
    return (items[first : first + size] for first in range(0, len(items), size))
