"""The ocean observations of 3 to 7 January 2004 off California (`wc13_*.nc`), with a part withheld.

6,815 real observations: altimeter sea level, satellite SST, temperature and salinity profiles; beside each the
background of a ROMS model and its 4D-Var analysis, which has seen all of them. Protocol: of every platform 20 % of its
blocks of one degree are withheld, whatever their time and depth, at least one, for five seeds.
"""

from __future__ import annotations

import numpy as np

from data.sources.location import locate
from data.sources.observations import roms
from data.sources.observations.table import Table
from data.sources.series import open_file

# What scores are given for: name, units, channel of the table.
QUANTITIES = {"SSH": ("m", "zeta"), "T": ("degC", "temperature"), "S": ("", "salinity")}
SURFACE_TEMPERATURE = "blended_SST"  # the platform of satellite SST
SEEDS = (0, 1, 2, 3, 4)
WITHHELD = 0.2


def read(observations: str = "catalogue:wc13_obs.nc", equivalents: str = "catalogue:wc13_mod.nc") -> Table:
    """All observations in the file's order; columns `background` and `analysis` (R,) float64 are the model's values at
    them, `observed` the value in float64, `level` an s-level (30: the surface). Raises OSError and ValueError.
    """
    table = roms.read(locate(observations)[0])
    with open_file(locate(equivalents)[0]) as model:
        values = {
            column: model[name].values.astype(np.float64)
            for column, name in (("background", "NLmodel_initial"), ("analysis", "NLmodel_value"))
        }
    with open_file(locate(observations)[0]) as file:
        values["observed"] = file["obs_value"].values.astype(np.float64)
    for name, column in values.items():
        if len(column) != len(table):
            raise ValueError(
                f"{equivalents} has {len(column)} values of {name}, {observations} has {len(table)} observations; give "
                "the model's values at these observations"
            )
    return table.with_columns(**values)


def blocks(table: Table) -> np.ndarray:
    """(R,) int64: the number of each row's block of one degree of one platform, by platform, longitude, latitude."""
    corner = np.floor(np.stack([table["longitude"], table["latitude"]], axis=1)).astype(np.int64)
    _, number = np.unique(np.concatenate([table["platform"][:, None], corner], axis=1), axis=0, return_inverse=True)
    return number.reshape(-1)


def withheld(table: Table, seed: int) -> np.ndarray:
    """(R,) bool: the rows that one seed withholds."""
    random, number = np.random.default_rng(seed), blocks(table)
    chosen = []
    for platform in np.unique(table["platform"]):
        own = np.unique(number[table["platform"] == platform])
        chosen.append(random.permutation(own)[: max(1, round(WITHHELD * own.size))])
    return np.isin(number, np.concatenate(chosen))
