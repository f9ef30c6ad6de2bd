"""What parts of a model need to know before data flows: variables, grids, frames and lead times, as plain JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cached_property

import numpy as np

from data.grids import Grid

_CHOSEN = ("lead_times", "trained")  # of the same data a run may be asked to go on with others


@dataclass(frozen=True)
class Variable:
    """A physical quantity.

    level: pressure (hPa) or depth (m) of this slice. domain: where it exists (all, sea, land).
    """

    name: str
    units: str = ""
    level: float | None = None
    domain: str = "all"

    @property
    def label(self) -> str:
        return self.name if self.level is None else f"{self.name}@{self.level:g}"

    def to_dict(self) -> dict:
        return {"name": self.name, "units": self.units, "level": self.level, "domain": self.domain}


@dataclass(frozen=True)
class InputLayout:
    """variables on a grid, `frames` of them `step` seconds apart; gaps: whether values can be missing.

    frames_per_group: frames in a row that belong together (the days of a month, padded to 31); 1: there are no groups.
    """

    variables: tuple[Variable, ...]
    grid: Grid
    frames: int
    step: int
    gaps: bool = False
    frames_per_group: int = 1

    def __post_init__(self):
        if self.frames_per_group < 1 or self.frames % self.frames_per_group:
            raise ValueError(f"{self.frames} frames are no whole groups of {self.frames_per_group}")

    @property
    def groups(self) -> int:
        """How many groups the frames form."""
        return self.frames // self.frames_per_group

    @property
    def channels(self) -> int:
        """Channels of one frame as a model reads them: values, and their validity where gaps occur."""
        return len(self.variables) * (2 if self.gaps else 1)


@dataclass(frozen=True)
class TargetLayout:
    """variables on a grid at fixed lead_times (seconds after the last input frame).

    trained: the lead times that training draws from, sample by sample; empty: it takes all of lead_times.
    feeds: the input whose next frame a prediction one step ahead is: later lead times are reached step by step
    (`models/rollout.py`); empty: each is predicted at once.
    """

    variables: tuple[Variable, ...]
    grid: Grid
    lead_times: tuple[int, ...]
    trained: tuple[int, ...] = ()
    feeds: str = ""

    @property
    def trained_lead_times(self) -> tuple[int, ...]:
        """What a model of this layout has seen in training, in increasing order."""
        return tuple(sorted(self.trained or self.lead_times))


@dataclass(frozen=True)
class SequenceLayout:
    """At most `length` tokens of a vocabulary of `vocab_size`. As a target: those that latents predict."""

    vocab_size: int
    length: int

    def __post_init__(self):
        if self.vocab_size < 1 or self.length < 1:
            raise ValueError(f"a sequence needs a vocabulary and a length of at least 1, got {self}")

    @property
    def frames(self) -> int:
        """One: tokens have an order and no clock."""
        return 1


@dataclass(frozen=True)
class ObservationLayout:
    """Observations of `frames` frames, `step` seconds apart. num_*: sizes of the id tables; ids are smaller.

    num_features: length of a row's description (`Observations.features`). channels, platforms, types: what ids
    mean, in order, where the data say so: a model then refuses observations whose ids mean something else.
    """

    num_channels: int
    num_platforms: int
    num_types: int
    num_features: int
    frames: int
    step: int
    channels: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ()
    types: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("channels", "platforms", "types"):  # lists, where it was JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class Layout:
    """What parts need to know before data flows. Plain JSON through `to_dict` and `Layout.from_dict`.

    crops: whether samples are crops that bring their places (`Field.coordinates`).
    """

    inputs: dict[str, InputLayout | SequenceLayout]
    targets: dict[str, TargetLayout | SequenceLayout]
    observations: ObservationLayout | None = None
    crops: bool = False

    @property
    def sequences(self) -> dict[str, SequenceLayout]:
        """The inputs and targets that are tokens."""
        described = [*self.inputs.items(), *self.targets.items()]
        return {name: item for name, item in described if isinstance(item, SequenceLayout)}

    @property
    def frames(self) -> int:
        """Frames of the longest input; inputs of one frame stand for all of them."""
        observed = 1 if self.observations is None else self.observations.frames
        return max(observed, *(item.frames for item in self.inputs.values()))

    def frames_of(self, target: str, frames: int | None = None) -> list[int] | None:
        """Which frame stands for each time of a target; None where a time is none of the frames' (a forecast).

        frames: how many there are, ending at the last input frame; None: all of the layout. Where there are as many as
        groups of frames, each ends where its group does.
        """
        if isinstance(self.targets[target], SequenceLayout):
            return None
        frames = self.frames if frames is None else frames
        described = [*self.inputs.values(), *([self.observations] if self.observations is not None else [])]
        step = next((item.step for item in described if item.frames == frames), 0)
        if not step:
            grouped = (item for item in self.inputs.values() if getattr(item, "frames_per_group", 1) > 1)
            step = next((item.step * item.frames_per_group for item in grouped if item.groups == frames), 0)
        offsets = [(frame + 1 - frames) * step for frame in range(frames)]
        wanted = self.targets[target].lead_times
        return [offsets.index(time) for time in wanted] if set(wanted) <= set(offsets) else None

    @cached_property
    def windows(self) -> dict[str, dict[str, tuple[slice, ...]]]:
        """{target: {input: where the target's grid lies in the input's}} of the inputs that hold all of it."""
        return {
            target: {
                name: window
                for name, item in self.inputs.items()
                if name not in self.sequences and (window := item.grid.find(described.grid)) is not None
            }
            for target, described in self.targets.items()
            if target not in self.sequences
        }

    def query_features(self, target: str) -> int:
        """Channels of `Query.features` for this target; 0 where no input holds its grid."""
        return sum(self.inputs[name].frames * self.inputs[name].channels for name in self.windows[target])

    def to_dict(self) -> dict:
        def plain(item):
            if isinstance(item, SequenceLayout):
                return asdict(item)
            described = {f.name: getattr(item, f.name) for f in fields(item)}
            described["variables"] = [variable.to_dict() for variable in item.variables]
            described["grid"] = item.grid.to_dict()
            return described

        return {
            "inputs": {name: plain(item) for name, item in self.inputs.items()},
            "targets": {name: plain(item) for name, item in self.targets.items()},
            "observations": None if self.observations is None else asdict(self.observations),
            "crops": self.crops,
        }

    def differences(self, other: Layout) -> list[str]:
        """What `other` has that this has not, in words, where it is of other data; lead times do not count."""
        return _differences("", _by_name(self.to_dict()), _by_name(other.to_dict()))

    @staticmethod
    def from_dict(description: dict) -> Layout:
        def restored(kind, item):
            if "vocab_size" in item:
                return SequenceLayout(**item)
            arguments = dict(item)
            arguments["variables"] = tuple(Variable(**variable) for variable in item["variables"])
            arguments["grid"] = Grid.from_dict(item["grid"])
            for name in ("lead_times", "trained"):
                if name in arguments:
                    arguments[name] = tuple(arguments[name])
            return kind(**arguments)

        return Layout(
            inputs={name: restored(InputLayout, item) for name, item in description["inputs"].items()},
            targets={name: restored(TargetLayout, item) for name, item in description["targets"].items()},
            observations=ObservationLayout(**observed) if (observed := description.get("observations")) else None,
            crops=description.get("crops", False),
        )


def _by_name(description: dict) -> dict:
    """Descriptions of variables under their labels, beside the order of these."""
    described = {key: _by_name(item) if isinstance(item, dict) else item for key, item in description.items()}
    if isinstance(described.get("variables"), list):
        variables = [Variable(**item) for item in described["variables"]]
        described["variables"] = [variable.label for variable in variables]
        described |= {f"variables.{variable.label}": variable.to_dict() for variable in variables}
    return described


def _differences(name: str, ours, theirs) -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = [key for key in ours | theirs if key not in _CHOSEN]
        return [said for key in keys for said in _differences(f"{name}.{key}", ours.get(key), theirs.get(key))]
    return [] if ours == theirs else [f"{name[1:]} is {_short(theirs)}, not {_short(ours)}"]


def _short(value) -> str:
    if value is None or isinstance(value, dict):
        return "absent" if value is None else "given"
    if isinstance(value, list | tuple):
        numbers = np.asarray(value)
        if numbers.size and numbers.dtype.kind in "if":
            shape = " x ".join(map(str, numbers.shape))
            return f"{shape} values from {numbers.flat[0]:g} to {numbers.flat[-1]:g}"
        return f"[{', '.join(map(str, value))}]"
    return repr(value)
