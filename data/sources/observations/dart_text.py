"""DART observation sequences as text (`obs_seq.out`, `obs_seq.final`), with the ensembles a filter left in them.

Channels are the observation kinds of the header (`type` holds DART's own numbers). A vertical place in Pa becomes
pressure (hPa), one in metres height. error is the root of the error variance. qc_flag is the DART quality control where
the file has it (0 assimilated, 1 evaluated only, 2-8 not used), data_qc the flag that came with the data. `prior` and
`posterior` (R, K) are the members, in order; prior_mean, prior_spread and so on the filter's own. `record` is the
observation's number in the file. Format: DART documentation, "Detailed structure of an obs_seq file".
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np

from data.calendars import date_to_seconds
from data.sources.observations.reports import damaged, existing
from data.sources.observations.table import Table

MISSING = -888888.0
_EPOCH = date_to_seconds((1601, 1, 1))  # of DART's Gregorian days
_METRES, _PASCALS = (-1, 3), (2,)  # vertical coordinates: -1 is the surface, with its elevation


def read(path: str | PathLike, *, start: int | None = None, stop: int | None = None) -> Table:
    """The observations of a file in its order; those without a value are left out. Raises OSError and ValueError."""
    path = existing(path)
    try:
        # Blank lines carry nothing: some observations have one between copies.
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        header, body = _header(lines)
        records = _records(lines[body:], header)
    except (UnicodeDecodeError, ValueError, IndexError, KeyError) as error:
        raise damaged(path, error, "a DART observation sequence") from error
    return _table(header, records, path).between(start, stop)


def _header(lines: list[str]) -> tuple[dict, int]:
    """(kinds {number: name}, copies, controls: names in order, size), and where the observations begin."""
    if lines[0] != "obs_sequence" or lines[1] not in ("obs_type_definitions", "obs_kind_definitions"):
        raise ValueError("it does not start with obs_sequence and obs_type_definitions")
    count = int(lines[2])
    kinds = {int(number): name for number, name in (line.split() for line in lines[3 : 3 + count])}
    sizes = " ".join(lines[3 + count : 5 + count]).replace(":", " ").split()
    sizes = {name: int(number) for name, number in zip(sizes[::2], sizes[1::2], strict=True)}
    names = 5 + count
    copies = lines[names : names + sizes["num_copies"]]
    body = names + sizes["num_copies"] + sizes["num_qc"]
    controls = lines[names + sizes["num_copies"] : body]
    return {"kinds": kinds, "copies": copies, "controls": controls, "size": sizes["num_obs"]}, body + 1


def _records(lines: list[str], header: dict) -> dict[str, np.ndarray]:
    starts = [number for number, line in enumerate(lines) if line.startswith("OBS ")]
    if len(starts) != header["size"]:
        raise ValueError(f"the header promises {header['size']} observations, {len(starts)} are there")
    width = len(header["copies"]) + len(header["controls"])
    numbers, places, kinds, times, variances = [], [], [], [], []
    for first, last in zip(starts, [*starts[1:], len(lines)], strict=True):
        numbers.append(lines[first + 1 : first + 1 + width])
        block = lines[first + 1 + width : last]
        where = block.index("obdef") + 1
        if block[where] != "loc3d":
            raise ValueError(f"observations are placed by {block[where]}, only loc3d (the sphere) can be read")
        places.append(block[where + 1].split())
        kinds.append(block[block.index("kind") + 1])
        times.append(block[-2].split())
        variances.append(block[-1])
    if not starts:
        raise ValueError("it holds no observations")
    return {
        "numbers": np.array(numbers, dtype=np.float64),
        "places": np.array(places, dtype=np.float64),
        "kinds": np.array(kinds, dtype=np.int64),
        "times": np.array(times, dtype=np.int64),
        "variances": np.array(variances, dtype=np.float64),
    }


def _table(header: dict, records: dict[str, np.ndarray], path: Path) -> Table:
    unknown = np.setdiff1d(records["kinds"], list(header["kinds"]))
    if unknown.size:
        raise ValueError(f"{path}: observations of the kinds {', '.join(map(str, unknown))} are not in its header")
    numbers = np.where(records["numbers"] == MISSING, np.nan, records["numbers"])
    by_name = {
        name.lower(): column for name, column in zip([*header["copies"], *header["controls"]], numbers.T, strict=True)
    }
    value = by_name.get("observation", by_name.get("observations", numbers[:, 0]))
    numbered = np.array(sorted(header["kinds"]))
    vertical, which = records["places"][:, 2], records["places"][:, 3].astype(np.int64)
    columns = {
        "value": value,
        "longitude": np.rad2deg(records["places"][:, 0]),
        "latitude": np.rad2deg(records["places"][:, 1]),
        "time": _EPOCH + records["times"][:, 1] * 86_400 + records["times"][:, 0],
        "channel": np.searchsorted(numbered, records["kinds"]),
        "type": records["kinds"],
        "pressure": np.where(np.isin(which, _PASCALS), vertical / 100, np.nan),
        "height": np.where(np.isin(which, _METRES), vertical, np.nan),
        "error": np.sqrt(records["variances"]),
        "record": np.arange(1, value.size + 1),
    }
    for name, column in (("DART quality control", "qc_flag"), ("Data QC", "data_qc")):
        if name.lower() in by_name:
            columns[column] = np.nan_to_num(by_name[name.lower()], nan=-1.0).astype(np.int64)
    for stage in ("prior", "posterior"):
        members = [number for name, number in by_name.items() if name.startswith(f"{stage} ensemble member")]
        if members:
            columns[stage] = np.stack(members, axis=1)
        for moment in ("mean", "spread"):
            if f"{stage} ensemble {moment}" in by_name:
                columns[f"{stage}_{moment}"] = by_name[f"{stage} ensemble {moment}"]
    table = Table(columns, {"channel": tuple(header["kinds"][number] for number in numbered)})
    return table.select(np.isfinite(value))
