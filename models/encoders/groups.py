"""Which tokens form a group of a Hierarchical Perceiver, as tables of indices made before any data.

The rows of a batch are the tokens of all inputs in layout order: input, frame, cell. Letters: G groups, M tokens of the
largest group, R rows of all inputs, T frames of the window, F frames of an input, P cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from data.layout import InputLayout, Layout

GROUPINGS = ("time", "stream")
STATICS = ("repeated", "own_group")


@dataclass(frozen=True)
class Grouping:
    """rows: (G, M) int64 of the rows in each group, -1 where a group is padded.

    frames: (G, c) int64, the frames of the window whose observations a group holds, -1 where padded.
    slots: (R,) int64, where a row stands among the G M places of `rows`; the last one where a group repeats it.
    """

    rows: Tensor
    frames: Tensor
    slots: Tensor


def by_time(layout: Layout, groups: int | None, *, static: str) -> Grouping:
    """A group for each frame of the window, older ones first, holding the tokens of every stream of that time.

    Inputs of other frames than the window's join the group nearest to them in time. static: inputs of one frame are
    repeated in every group, or have an own group before the others. groups: None, as many as that gives; more begin
    with empty ones; where fewer, neighbours in time share one.
    """
    frames, rows = layout.frames, _rows(layout)
    members = [[] for _ in range(frames)]
    own = []
    for name, item in layout.inputs.items():
        if item.frames == 1 and static == "own_group":
            own.append(rows[name][0])
            continue
        for frame, given in enumerate(_frames_of_groups(item, layout)):
            members[frame] += [rows[name][index] for index in given]
    times = [[frame] for frame in range(frames)]
    if own:
        members, times = [own, *members], [[], *times]
    return _grouping(*_shared_out(members, times, len(members) if groups is None else groups), layout)


def by_stream(layout: Layout, groups: int | None) -> Grouping:
    """Groups of one stream each, handed out so that the largest is as small as it can be.

    A stream is an input with all its frames, cut into equally long groups of neighbours. groups: None, one a stream.
    Raises ValueError where there are fewer groups than streams. Observations have no group: they are refused before.
    """
    streams = [np.concatenate(rows) for rows in _rows(layout).values()]
    groups = len(streams) if groups is None else groups
    if groups < len(streams):
        raise ValueError(
            f"model.encoder.groups[0]={groups} is fewer than the {len(streams)} inputs, of which each has own groups; "
            f"use at least {len(streams)}, or model.encoder.grouping=time"
        )
    counts = [1] * len(streams)
    for _ in range(groups - len(streams)):
        counts[int(np.argmax([-(-len(rows) // count) for rows, count in zip(streams, counts, strict=True)]))] += 1
    members = []
    for rows, count in zip(streams, counts, strict=True):
        size = -(-len(rows) // count)
        members += [[rows[index * size : (index + 1) * size]] for index in range(count)]
    return _grouping(members, [[] for _ in members], layout)


def _rows(layout: Layout) -> dict[str, list[np.ndarray]]:
    """Of every input, the rows of each of its frames."""
    sizes = [item.frames * item.grid.num_points for item in layout.inputs.values()]
    starts = accumulate([0, *sizes[:-1]])
    return {
        name: np.split(start + np.arange(size), item.frames)
        for (name, item), start, size in zip(layout.inputs.items(), starts, sizes, strict=True)
    }


def _frames_of_groups(item: InputLayout, layout: Layout) -> list[list[int]]:
    """For every frame of the window, the frames of an input that belong to it: all at one time, or the nearest."""
    if item.frames == 1:
        return [[0]] * layout.frames
    described = [*layout.inputs.values(), *([layout.observations] if layout.observations is not None else [])]
    step = next(other.step for other in described if other.frames == layout.frames)
    found: list[list[int]] = [[] for _ in range(layout.frames)]
    for frame in range(item.frames):
        age = (item.frames - 1 - frame) * item.step
        found[max(0, layout.frames - 1 - round(age / step))].append(frame)
    return found


def _shared_out(members: list[list], times: list[list[int]], groups: int) -> tuple[list[list], list[list[int]]]:
    """Members of `groups` groups: empty ones in front, or neighbours together, the first group the shortest."""
    together = -(-len(members) // groups)
    missing = groups * together - len(members)
    members, times = [[[]] * missing + list(part) for part in (members, times)]

    def joined(parts: list[list]) -> list[list]:
        return [list(chain(*parts[first : first + together])) for first in range(0, len(parts), together)]

    return joined(members), joined(times)


def _grouping(members: list[list], times: list[list[int]], layout: Layout) -> Grouping:
    rows = _padded([np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in members])
    total = sum(item.frames * item.grid.num_points for item in layout.inputs.values())
    slots = np.zeros(total, np.int64)
    places = np.flatnonzero(rows.ravel() >= 0)
    slots[rows.ravel()[places]] = places
    frames = _padded([np.array(given, np.int64) for given in times])
    return Grouping(*map(torch.from_numpy, (rows, frames, slots)))


def _padded(lists: list[np.ndarray]) -> np.ndarray:
    width = max(1, *(len(item) for item in lists))
    return np.stack([np.concatenate([item, np.full(width - len(item), -1)]) for item in lists]).astype(np.int64)
