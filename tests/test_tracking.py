"""Tracking in MLflow: complete when the store works, silent about the run when it does not."""

import json
import multiprocessing
import sqlite3
import warnings

import pytest

from training import tracking, tracking_store
from training.import_tracking import import_run
from training.metrics_log import MetricsLog
from training.tracking import BUFFER, NoTracker, Tracker, build_tracker
from training.tracking_store import Store, resolve_uri

EXPERIMENT = "test"


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One database for the module: creating it takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def start(folder, uri, **changes) -> Tracker:
    settings = dict(uri=uri, experiment=EXPERIMENT, run_name="name", flush_every=2, parent=None)
    return Tracker(folder, **(settings | changes))


def stored(folder, uri):
    client, _ = Store(uri, EXPERIMENT).client()
    return client, client.get_run((folder / "mlflow_run_id").read_text().strip())


def history(folder, uri, key="train/loss"):
    client, run = stored(folder, uri)
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key))


def write_metrics(folder, steps, last_step=0):
    log = MetricsLog(folder / "metrics.jsonl", last_step=last_step)
    for step in steps:
        log.write(step, {"train/loss": step / 10})
    log.close()


def test_a_run_holds_everything_that_was_logged(tmp_path, uri):
    tracker = start(tmp_path, uri, parent="a" * 32)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    tracker.tags({"model": "perceiver_io"})
    tracker.params({"optimizer.lr": 0.1, "odd key@1": "x" * 7000})
    for step in range(1, 6):
        tracker.log(step, {"train/loss": step / 10})
    tracker.log(5, {"test/rmse/t@850/6h": 2.5})
    tracker.artifact(tmp_path / "config.yaml")
    tracker.artifact(tmp_path / "missing.txt")
    tracker.finish()
    client, run = stored(tmp_path, uri)
    assert run.info.status == "FINISHED" and run.info.run_name == "name"
    assert run.data.tags["model"] == "perceiver_io" and run.data.tags["mlflow.parentRunId"] == "a" * 32
    assert run.data.params["optimizer.lr"] == "0.1" and len(run.data.params["odd key_1"]) == 6000
    assert run.data.metrics["test/rmse/t_850/6h"] == 2.5
    assert history(tmp_path, uri) == [(step, step / 10) for step in range(1, 6)]
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    assert not (tmp_path / BUFFER).exists()


def test_a_resumed_run_has_no_gap_and_nothing_twice(tmp_path, uri):
    """Killed with steps 3 and 4 unsent, resumed from a checkpoint of step 4, which repeats nothing before it."""
    write_metrics(tmp_path, [1, 2, 3, 4])
    tracker = start(tmp_path, uri)
    tracker._earlier = []
    tracker.params({"optimizer.lr": 0.1})
    for step in (1, 2):
        tracker.log(step, {"train/loss": step / 10})
    tracker.finish("KILLED")
    run_id = (tmp_path / "mlflow_run_id").read_text()

    tracker = start(tmp_path, uri)
    tracker.params({"optimizer.lr": 0.5})  # cannot be changed, and must not stop anything
    for step in (2, 5, 6):  # 2 again: a checkpoint may be older than what was sent
        tracker.log(step, {"train/loss": step / 10})
    tracker.finish()
    assert (tmp_path / "mlflow_run_id").read_text() == run_id
    assert history(tmp_path, uri) == [(step, step / 10) for step in range(1, 7)]
    assert stored(tmp_path, uri)[1].data.params == {"optimizer.lr": "0.1"}
    assert not (tmp_path / BUFFER).exists()


@pytest.mark.parametrize("breakage", ["corrupt", "folder", "locked"])
def test_a_broken_store_warns_once_and_its_log_is_imported_later(tmp_path, uri, breakage, monkeypatch):
    broken = tmp_path / "broken.db"
    if breakage == "folder":
        broken.mkdir()
    elif breakage == "corrupt":
        broken.write_bytes(b"no database" * 1000)
    else:
        monkeypatch.setattr(tracking_store, "BUSY_SECONDS", 0.1)
        holder = sqlite3.connect(broken, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
    (tmp_path / "config.yaml").write_text(
        json.dumps({"tracking": {"uri": uri, "experiment": EXPERIMENT, "run_name": None}})
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker = start(tmp_path, f"sqlite:///{broken}")
        tracker.params({"seed": 1})
        for step in (1, 2, 3):
            tracker.log(step, {"train/loss": step / 10})
        tracker.finish()
    ours = [item for item in caught if "tracking stopped" in str(item.message)]
    assert len(ours) == 1 and "import_tracking" in str(ours[0].message)
    assert not (tmp_path / "mlflow_run_id").exists()
    lines = [json.loads(line) for line in (tmp_path / BUFFER).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["params", "metrics", "metrics", "metrics", "status"]

    assert import_run(tmp_path) == 5
    assert history(tmp_path, uri) == [(step, step / 10) for step in (1, 2, 3)]
    assert stored(tmp_path, uri)[1].info.status == "FINISHED"
    assert not (tmp_path / BUFFER).exists()
    assert import_run(tmp_path) == 0


def test_a_store_that_locks_in_the_middle_costs_only_a_local_log(tmp_path, uri, monkeypatch):
    import mlflow

    tracker = start(tmp_path, uri)
    tracker.log(2, {"train/loss": 0.2})
    assert wait_for(lambda: not tracker._events)

    def locked(*_, **__):
        raise sqlite3.OperationalError("database is locked")

    with pytest.warns(UserWarning, match="database is locked"):
        with monkeypatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, "log_batch", locked)
            tracker.log(4, {"train/loss": 0.4})
            tracker._thread.join(30)
        tracker.log(6, {"train/loss": 0.6})
        tracker.finish()
    assert history(tmp_path, uri) == [(2, 0.2)]
    resumed = start(tmp_path, uri)
    resumed.finish()
    assert history(tmp_path, uri) == [(2, 0.2), (4, 0.4), (6, 0.6)]


def test_a_store_that_never_answers_does_not_hold_the_end(tmp_path, monkeypatch):
    import threading

    never = threading.Event()
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
    monkeypatch.setattr(Store, "client", lambda self: never.wait(20) and None)
    tracker = start(tmp_path, "http://127.0.0.1:9")
    tracker.log(1, {"train/loss": 0.1})
    with pytest.warns(UserWarning, match="no answer"):
        tracker.finish()
    assert [json.loads(line)["kind"] for line in (tmp_path / BUFFER).read_text().splitlines()] == ["metrics", "status"]
    never.set()
    tracker._thread.join(10)


def test_folders_are_no_stores():
    for uri in ("file:./mlruns", "file:///elsewhere/mlruns", "mlruns", "/elsewhere/mlruns"):
        with pytest.raises(ValueError, match=f"tracking.uri={uri} is a folder"):
            resolve_uri(uri)
    assert resolve_uri(None) == f"sqlite:///{tracking_store.REPOSITORY / 'mlflow.db'}"
    assert resolve_uri("http://host:5000") == "http://host:5000"


def test_tracking_can_be_turned_off(tmp_path):
    from conf.schema import Tracking

    tracker = build_tracker(Tracking(enabled=False), tmp_path, run_name=None, parent=None)
    assert isinstance(tracker, NoTracker)
    tracker.log(1, {"train/loss": 0.1})
    tracker.finish()
    assert not list(tmp_path.iterdir())


def _log_one(arguments):
    folder, uri = arguments
    tracker = start(folder, uri)
    for step in range(1, 21):
        tracker.log(step, {"train/loss": step / 10})
    tracker.finish()
    return (folder / BUFFER).exists()


@pytest.mark.slow
def test_eight_processes_create_one_fresh_store(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    folders = [tmp_path / str(number) for number in range(8)]
    for folder in folders:
        folder.mkdir()
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        failed = pool.map(_log_one, [(folder, uri) for folder in folders], chunksize=1)
    assert failed == [False] * 8
    for folder in folders:
        assert history(folder, uri) == [(step, step / 10) for step in range(1, 21)]


def wait_for(condition, seconds: float = 30) -> bool:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.01)
    return condition()
