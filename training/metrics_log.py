"""`metrics.jsonl`: one line of JSON a training step, flushed at once, cut back to the checkpoint when a run resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path


def read_metrics(path: Path) -> list[dict]:
    """All complete lines; a line cut short by a killed process is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        lines.append(json.loads(line))
    return lines


class MetricsLog:
    """Appends to `path`; lines of steps after `last_step` are dropped first (they will be written again)."""

    def __init__(self, path: Path, *, last_step: int):
        kept = [line for line in read_metrics(path) if line["step"] <= last_step]
        beside = path.with_name(path.name + ".part")
        with open(beside, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        self.kept = kept
        self._file = open(path, "a")  # noqa: SIM115 - open for the length of the run, closed in close()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
