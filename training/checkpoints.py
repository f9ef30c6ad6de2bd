"""Checkpoints: folders that are complete or absent, the format of `docs/architecture.md`.

A folder is written beside its place, synced to the disk and renamed; `last` and `best` are relative symlinks that are
replaced atomically. Where weights are sharded over ranks, all of them write and the first one renames. Nothing that is
read back can run code: safetensors, JSON and `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from data.layout import Layout
from models.stored_weights import SHARDS, fill
from training.averaging import WeightAverage
from training.sharding import ShardWriter, copied, is_sharded, with_tensors, without_tensors

if TYPE_CHECKING:
    from data.analysis_normalisation import AnalysisNormalisation
    from data.datasets.wc13_innovations import InnovationStatistics
    from data.normalisation import Normalisation

FORMAT = 1
_STEP = re.compile(r"step_(\d+)")


class Checkpoints:
    """The `checkpoints` folder of a run.

    folder: `<run>/checkpoints`. keep: how many of the newest to keep; `best` is kept besides. background: whether to
    write while the run goes on, one checkpoint at a time; what goes wrong then is raised by the next `save` or `wait`.
    shards: given where weights are sharded; then every rank saves, and the one where is_first completes the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 1,
        background: bool = False,
        shards: ShardWriter | None = None,
        is_first: bool = True,
    ):
        if keep < 1:
            raise ValueError(f"trainer.keep={keep} must be at least 1")
        self.folder, self.keep = folder, keep
        self.shards, self.is_first = shards, is_first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._pending: Future | None = None

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(entry.name) for entry in self.folder.iterdir() if not entry.is_symlink())
        return sorted(int(match.group(1)) for match in matches if match)

    def save(
        self,
        step: int,
        files: Mapping[str, bytes],
        *,
        best_step: int | None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Writes one checkpoint, points `last` at it and `best` at `best_step`, removes what is no longer kept.

        files: name and content. tensors: sharded ones, of which every rank writes what it holds. Raises OSError with
        one sentence when the disk refuses; earlier checkpoints stay as they were.
        """
        self.wait()
        if self._thread is None:
            self._write(step, files, best_step, tensors)
        else:
            tensors = None if tensors is None else copied(tensors)
            self._pending = self._thread.submit(self._write, step, files, best_step, tensors)
        return self.path(step)

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what went wrong with the checkpoint before."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(
        self, step: int, files: Mapping[str, bytes], best_step: int | None, tensors: Mapping[str, Tensor] | None
    ) -> None:
        beside = self.folder / f".step_{step:08d}.part"
        try:
            if self.is_first:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            if tensors is not None:
                self.shards.wait_for_all()  # until the folder is there
                self.shards.write(beside / SHARDS, tensors)
            if self.is_first:
                self._complete(step, beside, files, best_step)
        except OSError as error:
            if self.is_first:
                shutil.rmtree(beside, ignore_errors=True)
            kept = self.steps()
            earlier = f"the checkpoint of step {kept[-1]} is intact" if kept else "no earlier checkpoint exists"
            raise OSError(
                f"cannot write the checkpoint of step {step} in {self.folder} ({error.strerror or error}); {earlier}; "
                f"free some space and type: python train.py resume={self.folder.parent}"
            ) from error
        if self.is_first:
            self._prune(best_step)

    def _complete(self, step: int, beside: Path, files: Mapping[str, bytes], best_step: int | None) -> None:
        """Adds the files, then lets the folder appear at its place."""
        target = self.path(step)
        for name, content in files.items():
            _write(beside / name, content)
        for folder in (beside / SHARDS, beside):
            if folder.is_dir():
                _sync_folder(folder)
        if target.exists():  # left by a process that was killed before `last` pointed here
            shutil.rmtree(target)
        os.rename(beside, target)
        self._point("last", step)
        if best_step is not None:
            self._point("best", best_step)
        _sync_folder(self.folder)

    def recover(self, step: int, best_step: int | None) -> None:
        """Puts the folder back to how it was right after `step` was saved: what a killed process left behind goes."""
        for beside in self.folder.glob(".*.part"):
            shutil.rmtree(beside, ignore_errors=True) if beside.is_dir() else beside.unlink()
        for newer in self.steps():
            if newer > step:
                shutil.rmtree(self.path(newer))
        self._point("last", step)
        if best_step is not None:
            self._point("best", best_step)

    def _point(self, name: str, step: int) -> None:
        beside = self.folder / f".{name}.part"
        beside.unlink(missing_ok=True)
        beside.symlink_to(self.path(step).name)
        os.replace(beside, self.folder / name)

    def _prune(self, best_step: int | None) -> None:
        for step in self.steps()[: -self.keep]:
            if step != best_step:
                shutil.rmtree(self.path(step), ignore_errors=True)


class RunFiles:
    """The files inside a checkpoint folder.

    description: content of config.json besides the format: model, task, layout (plain JSON).
    normalisation: the statistics of the task, stored by their `state_dict`.
    """

    def __init__(self, description: dict, normalisation: Normalisation | AnalysisNormalisation | InnovationStatistics):
        tensors, metadata = normalisation.state_dict()
        self._description = {"format": FORMAT, **description}
        self._constant = {
            "normalisation.safetensors": as_safetensors(tensors),
            "normalisation.json": _json(metadata),
        }

    def content(
        self, model: nn.Module, average: WeightAverage | None, optimizer: torch.optim.Optimizer, state: dict
    ) -> tuple[dict[str, bytes], dict[str, Tensor] | None]:
        """(names and bytes of files, sharded tensors or None). state: what only training needs besides; plain
        containers, numbers and tensors."""
        weights = {"model": model.state_dict()}
        state = dict(state, optimizer=optimizer.state_dict())
        if average is not None:
            weights["ema"] = average.model.state_dict()
            state["average_updates"] = average.updates
        files = {"config.json": _json({**self._description, "averaged": average is not None}), **self._constant}
        shards = None
        if is_sharded(model):
            state["optimizer"], shards = without_tensors(state["optimizer"])
            shards |= {f"{name}.{key}": tensor for name, held in weights.items() for key, tensor in held.items()}
        else:
            files |= {f"{name}.safetensors": as_safetensors(held) for name, held in weights.items()}
        buffer = io.BytesIO()  # straight to a file, torch.save reports a full disk without its errno
        torch.save(state, buffer)
        return {**files, "training_state.pt": buffer.getvalue()}, shards

    def read(
        self, checkpoint: Path, model: nn.Module, average: WeightAverage | None, optimizer: torch.optim.Optimizer
    ) -> dict:
        """Fills model, average and optimiser, sharded or whole, from a checkpoint of either kind; returns the rest.
        Raises ValueError when a file is damaged or does not fit."""
        with _readable(checkpoint):
            fill(model, checkpoint, "model")
            state = torch.load(checkpoint / "training_state.pt", map_location="cpu", weights_only=True)
            if average is not None and "average_updates" in state:
                fill(average.model, checkpoint, "ema")
                average.updates = state["average_updates"]
            elif average is not None:  # averaging starts with this resume
                average.model.load_state_dict(model.state_dict())
            optimizer.load_state_dict(with_tensors(state.pop("optimizer"), checkpoint, optimizer))
        return state


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Averaged weights where the checkpoint was saved with them, else the trained ones."""
    with _readable(checkpoint):
        averaged = json.loads((checkpoint / "config.json").read_text())["averaged"]
        fill(model, checkpoint, "ema" if averaged else "model")


def check_layout(checkpoint: Path, layout: Layout) -> None:
    """Raises ValueError where a run would go on with other data than its weights and statistics are of: other
    variables, units, grids or frames."""
    with _readable(checkpoint):
        stored = Layout.from_dict(json.loads((checkpoint / "config.json").read_text())["layout"])
    if found := stored.differences(layout):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"resume={checkpoint.parent.parent} cannot go on with what is given now: {', '.join(found[:3])}{more}; "
            "give the data and settings that it was started with, or start anew without resume"
        )


def read_normalisation(checkpoint: Path) -> Normalisation | AnalysisNormalisation | InnovationStatistics:
    """The statistics that the run was trained with."""
    from data.analysis_normalisation import AnalysisNormalisation
    from data.datasets.regimes import RegimeStatistics
    from data.datasets.solar_stations import SolarStatistics
    from data.datasets.wc13_innovations import InnovationStatistics
    from data.forced_normalisation import ForcedNormalisation
    from data.normalisation import Normalisation
    from data.quantisation import FieldQuantiser
    from data.radar_normalisation import RadarNormalisation

    with _readable(checkpoint):
        tensors = load((checkpoint / "normalisation.safetensors").read_bytes())
        description = json.loads((checkpoint / "normalisation.json").read_text())
        kinds = {
            "analysis": AnalysisNormalisation,
            "forced": ForcedNormalisation,
            "innovations": InnovationStatistics,
            "regimes": RegimeStatistics,
            "radar": RadarNormalisation,
            "solar": SolarStatistics,
            "tokens": FieldQuantiser,
        }
        kind = kinds.get(description.get("kind"), Normalisation)
        return kind.from_state(tensors, description)


@contextmanager
def _readable(checkpoint: Path):
    """Turns what damaged or foreign files raise into one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(
            f"the checkpoint {checkpoint} lacks {Path(error.filename).name}; use another one of the run, like last"
        ) from error
    except (
        SafetensorError,
        RuntimeError,
        LookupError,
        TypeError,
        pickle.UnpicklingError,
        EOFError,
        json.JSONDecodeError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the checkpoint {checkpoint} is damaged or belongs to another model ({reason}); "
            "use another checkpoint of the run, and to resume the overrides that it was started with"
        ) from error


def as_safetensors(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> bytes:
    """The content of a file; tied tensors are written under each of their names."""
    return save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
        None if header is None else dict(header),
    )


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
