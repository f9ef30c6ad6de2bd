"""Tracking in MLflow that never stops training.

The run's thread only appends events to a list; a second one imports MLflow (3 s), opens the store and sends them in
batches. When the store is locked, missing or broken there is one warning, and everything not yet sent goes to
`tracking_buffer.jsonl` in the run's folder, for the next `resume=` or for `python -m training.import_tracking <run>`.
"""

from __future__ import annotations

import json
import threading
import time
import warnings
from pathlib import Path

from training.metrics_log import read_metrics
from training.tracking_store import Store, resolve_uri

BUFFER = "tracking_buffer.jsonl"
FINISH_SECONDS = 180  # a store that does not answer holds the end of a run no longer than this


class NoTracker:
    """`tracking.enabled=false`: every call does nothing."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def params(self, values: dict) -> None: ...

    def tags(self, values: dict) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def finish(self, status: str = "FINISHED") -> None: ...


class Tracker:
    """One MLflow run: the one named in `<run_dir>/mlflow_run_id`, else a new one whose id is written there.

    uri, experiment: the store (`resolve_uri`). run_name: shown in the UI. flush_every: steps between batches.
    parent: id of the sweep's run, or None. On resume the buffer of an earlier failure and lines of `metrics.jsonl` that
    the store lacks are sent first, and steps the store already holds are not sent twice.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        uri: str | None,
        experiment: str,
        run_name: str | None,
        flush_every: int,
        system_metrics: bool = False,
        parent: str | None = None,
    ):
        self.run_dir, self.flush_every, self.system_metrics = run_dir, max(1, flush_every), system_metrics
        self._store = Store(resolve_uri(uri), experiment, run_name=run_name, parent=parent)
        self._earlier = read_metrics(run_dir / "metrics.jsonl")  # now: the file grows while the other thread starts
        self._events: list[dict] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = self._broken = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Metrics of one step, sent with the next batch."""
        self._add({"kind": "metrics", "step": step, "values": dict(values)}, send=step % self.flush_every == 0)

    def params(self, values: dict) -> None:
        self._add({"kind": "params", "values": {key: str(value) for key, value in values.items()}})

    def tags(self, values: dict) -> None:
        self._add({"kind": "tags", "values": {key: str(value) for key, value in values.items()}})

    def artifact(self, path: Path) -> None:
        """A file inside the run's folder."""
        self._add({"kind": "artifact", "path": str(path.relative_to(self.run_dir))})

    def finish(self, status: str = "FINISHED") -> None:
        """Sends what is left and closes the run with FINISHED, FAILED or KILLED."""
        self._add({"kind": "status", "value": status})
        self._closing = True
        self._wake.set()
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._give_up(f"no answer within {FINISH_SECONDS} s")

    def _add(self, event: dict, *, send: bool = True) -> None:
        event["time"] = int(time.time() * 1000)
        with self._lock:
            if self._broken:
                self._spill([event])
            else:
                self._events.append(event)
        if send:
            self._wake.set()

    def _work(self) -> None:
        try:
            with self._store.run(self.run_dir, system_metrics=self.system_metrics) as run:
                send_local_log(run, self.run_dir, self._earlier)
                while True:
                    self._wake.wait()
                    self._wake.clear()
                    with self._lock:
                        batch = list(self._events)
                    run.send(batch)
                    with self._lock:
                        if self._broken:
                            return
                        del self._events[: len(batch)]
                        if self._closing and not self._events:
                            return
        except Exception as error:  # whatever MLflow, SQLAlchemy or the network raise: training goes on
            self._give_up(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")

    def _give_up(self, reason: str) -> None:
        with self._lock:
            if self._broken:
                return
            self._broken = True
            self._spill(self._events)
            self._events = []
        warnings.warn(
            f"tracking stopped ({reason[:200]}); training goes on and the log is kept in {self.run_dir / BUFFER}; "
            f"send it later with: python -m training.import_tracking {self.run_dir}",
            stacklevel=2,
        )

    def _spill(self, events: list[dict]) -> None:
        try:
            with open(self.run_dir / BUFFER, "a") as file:
                file.writelines(json.dumps(event) + "\n" for event in events)
        except OSError as error:
            warnings.warn(f"the local tracking log cannot be written either ({error})", stacklevel=2)


def send_local_log(run, run_dir: Path, lines: list[dict]) -> int:
    """Sends the buffer of a run whose store had failed, and the `lines` of metrics.jsonl that it and the store lack;
    returns the number of events."""
    buffer = run_dir / BUFFER
    events = [json.loads(line) for line in buffer.read_text().splitlines()] if buffer.exists() else []
    buffered = {event["step"] for event in events if event["kind"] == "metrics"}
    now = int(time.time() * 1000)
    for line in lines:
        if line["step"] not in buffered and line["step"] > run.recorded_step:
            values = {key: value for key, value in line.items() if key != "step"}
            events.append({"kind": "metrics", "step": line["step"], "time": now, "values": values})
    run.send(events)
    buffer.unlink(missing_ok=True)
    return len(events)


def build_tracker(settings, run_dir: Path, *, run_name: str | None, parent: str | None):
    """A Tracker, or a NoTracker where `tracking.enabled=false`. settings: the `tracking` node of the configuration."""
    if not settings.enabled:
        return NoTracker()
    return Tracker(
        run_dir,
        uri=settings.uri,
        experiment=settings.experiment,
        run_name=settings.run_name or run_name,
        flush_every=settings.flush_every,
        system_metrics=settings.system_metrics,
        parent=parent,
    )
