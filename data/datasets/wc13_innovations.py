"""Innovations of the withheld ocean observations (`data/datasets/wc13.py`) as samples of a local analysis.

A sample is one place and what is known around it. Training samples are simulated: the places, times, errors and
backgrounds are those of the observations, the innovations are drawn from random covariances, blocks are left out as the
protocol does, and the answer is what the best linear analysis with the true covariance gives. Validation samples are
real observations that no seed withholds. Letters: B samples, n rows of a neighbourhood (the first is its centre).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.datasets import wc13
from data.datasets.neighbourhoods import KM_PER_DEGREE, RADII, Neighbourhoods, Rows
from data.datasets.random_covariances import RandomCovariances, Scales, fitted, kriging, sampled
from data.field import Field, Reference
from data.grids import Points
from data.layout import InputLayout, Layout, ObservationLayout, TargetLayout, Variable
from data.observations import Observations
from data.sources.observations.table import Table

KINDS = ("SSH", "SST", "T profiles", "S profiles")  # what covariances are fitted for
SHARES = (0.4, 0.4, 0.1, 0.1)  # of the training samples
REFERENCES = ("interpolation", "background")
TARGET = "innovation"
_CENTRES = 100  # places that covariances are fitted at
_JITTER = 0.3  # of fitted covariances in training, in the logarithm
_BROAD = 0.15  # share of training samples from covariances that were not fitted
_PRIOR = 4  # neighbours: the local scale counts that many with the typical innovation, so that it exists where none is
_VIRTUAL = 1_000_000  # training samples of an epoch
_DESCRIPTION = ("east", "north", "near", "middle", "far", "days", "apart_days", "levels", "apart_levels", "error",
                "background", "apart_background", "rough_60", "rough_150", "steeper_60", "steeper_150")  # fmt: skip


@dataclass(frozen=True)
class InnovationStatistics:
    """What training knows of the real innovations, from observations that no seed withholds: scales, and covariances
    of each of `KINDS`, the best first."""

    scales: Scales
    covariances: tuple[RandomCovariances, ...]

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, plain JSON): what a checkpoint stores."""
        tensors = {"innovation": self.scales.innovation, "background": self.scales.background}
        for k, covariances in enumerate(self.covariances):
            tensors |= {f"values_{k}": covariances.values, f"shape_{k}": covariances.shape}
        return tensors, {"kind": "innovations"}

    @staticmethod
    def from_state(tensors: dict[str, Tensor], description: dict) -> InnovationStatistics:
        covariances = [RandomCovariances(tensors[f"values_{k}"], tensors[f"shape_{k}"]) for k in range(len(KINDS))]
        return InnovationStatistics(Scales(tensors["innovation"], tensors["background"]), tuple(covariances))


class OceanInnovations:
    """observations, equivalents: the files of `wc13.read`. num_workers, fake, inspect, recommended: as in
    `GriddedData`. Raises ValueError and OSError where they cannot be used."""

    variables = tuple(Variable(name, units) for name, (units, _) in wc13.QUANTITIES.items())
    grid = Points([[0.0, 0.0]])  # a sample is described relative to its centre
    splits = ("train", "validation")

    available = True
    task = "leave_out"  # what suits this data

    def __init__(
        self,
        observations: str = "catalogue:wc13_obs.nc",
        equivalents: str = "catalogue:wc13_mod.nc",
        *,
        num_workers: int = 0,
        fake: bool = False,
        inspect: bool = False,
        recommended: Mapping | None = None,
    ):
        self.paths = (observations, equivalents)
        self.num_workers, self.fake, self.inspect = num_workers, fake, inspect
        self.recommended = dict(recommended or {})

    @property
    def layout(self) -> Layout:
        """A description of the centre and observations around it in, its innovation out; needs no file."""
        described = tuple(Variable(name) for name in ("level", "local_scale", "error", *_roughness_names()))
        kinds = tuple(Variable(name) for name in KINDS)
        return Layout(
            inputs={"centre": InputLayout(described + kinds, self.grid, frames=1, step=86_400)},
            targets={TARGET: TargetLayout(self.variables, self.grid, (0,))},
            observations=ObservationLayout(
                num_channels=len(self.variables) * len(KINDS),  # what was observed, for which centre
                num_platforms=16,
                num_types=1,
                num_features=len(_DESCRIPTION),
                frames=1,
                step=86_400,
            ),
        )

    @cached_property
    def table(self) -> Table:
        return wc13.read(*self.paths)

    @cached_property
    def rows(self) -> Rows:
        """Every observation, in the order of the file."""
        table = self.table
        names, surface = table.name_of("channel"), table.name_of("platform") == wc13.SURFACE_TEMPERATURE
        channels = [channel for _, channel in wc13.QUANTITIES.values()]
        quantity = np.select([names == channel for channel in channels], range(len(channels)), -1)
        kind = np.where(surface, 1, np.array([0, 2, 3])[quantity])
        values = {name: table[name] for name in ("latitude", "longitude", "level", "background", "error")}
        values |= {"time": (table["time"] - table["time"].min()) / 86_400}
        values |= {"innovation": table["observed"] - table["background"]}
        ids = {"quantity": quantity, "kind": kind, "platform": table["platform"], "block": wc13.blocks(table)}
        return Rows(
            **{name: torch.from_numpy(np.asarray(column, dtype=np.float64)) for name, column in values.items()},
            **{name: torch.from_numpy(np.asarray(column, dtype=np.int64)) for name, column in ids.items()},
        )

    @cached_property
    def always_known(self) -> Tensor:
        """(R,) bool: what no seed withholds."""
        hidden = [wc13.withheld(self.table, seed) for seed in wc13.SEEDS]
        return torch.from_numpy(~np.any(hidden, axis=0))

    def fit(self, known: Tensor | None = None, start: InnovationStatistics | None = None) -> InnovationStatistics:
        """known: (R,) bool, the innovations that may be read (None: those that no seed withholds). start: covariances
        to begin with; their scales are kept."""
        rows, known = self.rows, self.always_known if known is None else known
        generator = torch.Generator().manual_seed(0)
        scales = Scales.of(rows, known) if start is None else start.scales
        covariances = []
        for kind in range(len(KINDS)):
            centres = torch.nonzero(known & (rows.kind == kind))[:, 0]
            centres = centres[torch.randperm(len(centres), generator=generator)[:_CENTRES]]
            first = None if start is None else start.covariances[kind]
            covariances.append(fitted(rows, known, centres, scales, generator=generator, start=first))
        return InnovationStatistics(scales, tuple(covariances))

    def describe(self) -> str:
        """Counts of every kind (several lines, for people)."""
        hidden = [wc13.withheld(self.table, seed) for seed in wc13.SEEDS]
        lines = []
        for kind, name in enumerate(KINDS):
            own = (self.rows.kind == kind).numpy()
            withheld = ", ".join(str(int((own & mask).sum())) for mask in hidden)
            lines.append(f"{name:<11} {own.sum()} observations; withheld by the seeds: {withheld}")
        return "\n".join(lines)


class InnovationDataset:
    """Samples of one split. reference: what the output is added to: the `interpolation` with the best fitted covariance
    of its kind, or the `background` (0).

    Batches: input `centre` (B, 1, variables, 1), the observations around it described by features of their own, target
    `innovation` (B, 1, quantities, 1) in units of the quantity's scale, valid for the one that was observed.
    """

    target = TARGET

    def __init__(self, data: OceanInnovations, split: str, statistics: InnovationStatistics, *, reference: str):
        if reference not in REFERENCES:
            raise ValueError(f"task.reference={reference} is unknown; allowed: {', '.join(REFERENCES)}")
        self.data, self.split, self.statistics, self.reference = data, split, statistics, reference
        self.layout = data.layout
        if split != "train":
            self.allowed = data.always_known
            self.centres = torch.nonzero(self.allowed)[:, 0]

    def __len__(self) -> int:
        return _VIRTUAL if self.split == "train" else len(self.centres)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        if self.split == "train":
            return self.simulated(len(indices), torch.Generator().manual_seed(int(indices[0])))
        return self.real(self.centres[torch.as_tensor(indices)], self.allowed)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def tuned(self, known: Tensor) -> InnovationDataset:
        """The same with a reference that is tuned on the known innovations (R,)."""
        statistics = self.data.fit(known, self.statistics) if self.reference == "interpolation" else self.statistics
        return InnovationDataset(self.data, self.split, statistics, reference=self.reference)

    def simulated(self, number: int, generator: torch.Generator) -> Batch:
        """Samples with innovations of random covariances. The answer is their expectation under the true covariance:
        the same best analysis as drawn values would teach, with far less noise."""
        rows, statistics = self.data.rows, self.statistics
        kind = torch.multinomial(torch.tensor(SHARES), number, replacement=True, generator=generator)
        pools = [torch.nonzero(rows.kind == k)[:, 0] for k in range(len(KINDS))]
        drawn = torch.rand(number, generator=generator, dtype=torch.float64)
        centres = torch.stack([pools[k][int(u * len(pools[k]))] for k, u in zip(kind.tolist(), drawn, strict=True)])
        blocks = torch.rand(number, int(rows.block.max()) + 1, generator=generator) >= wc13.WITHHELD
        around = Neighbourhoods.around(rows, centres, blocks[:, rows.block])
        covariances = self._covariances(kind, generator)
        matrix = covariances.matrix(around, rows, statistics.scales)
        noise = covariances.noise_variance(around, rows, statistics.scales)
        values = sampled(matrix, noise, generator)
        return self._batch(around, values, kriging(matrix, noise, around.known, values))

    def real(self, centres: Tensor, allowed: Tensor) -> Batch:
        """centres: (B,) rows; allowed: (R,) bool, the observations that may be read."""
        rows = self.data.rows
        around = Neighbourhoods.around(rows, centres, allowed)
        values = (rows.innovation / self.statistics.scales.innovation[rows.quantity])[around.row]
        return self._batch(around, torch.where(around.known, values, 0.0), values[:, 0])

    def _covariances(self, kind: Tensor, generator: torch.Generator) -> RandomCovariances:
        number = len(kind)
        broad = RandomCovariances.draw(number, generator)
        chosen = torch.rand(number, generator=generator)
        fitted_ones = self.statistics.covariances
        picks = [fitted_ones[k].chosen((chosen[i : i + 1] * len(fitted_ones[k])).long()) for i, k in enumerate(kind)]
        near = RandomCovariances(torch.cat([p.values for p in picks]), torch.cat([p.shape for p in picks]))
        near = near.jittered(_JITTER, generator)
        free = torch.rand(number, 1, generator=generator) < _BROAD
        return RandomCovariances(
            torch.where(free, broad.values, near.values), torch.where(free, broad.shape, near.shape)
        )

    def interpolated(self, around: Neighbourhoods, values: Tensor) -> Tensor:
        """(B,) kriging with the best fitted covariance of each centre's kind; values (B, n) in units of the scales."""
        rows, statistics = self.data.rows, self.statistics
        found = torch.zeros(len(around), dtype=torch.float64)
        kind = rows.kind[around.row[:, 0]]
        for k in kind.unique().tolist():
            own = torch.nonzero(kind == k)[:, 0]
            part, best = around.chosen(own), statistics.covariances[k].chosen(torch.tensor([0]))
            matrix = best.matrix(part, rows, statistics.scales)
            noise = best.noise_variance(part, rows, statistics.scales)
            found[own] = kriging(matrix, noise, part.known, values[own])
        return found

    def _batch(self, around: Neighbourhoods, values: Tensor, truth: Tensor) -> Batch:
        """values: (B, n), in units of the quantity's scale; truth: (B,)."""
        rows, scales, batch = self.data.rows, self.statistics.scales, len(around)
        row, known = around.row, around.known
        centre = row[:, 0]
        quantity = rows.quantity[row]
        own = known & (quantity == quantity[:, :1])
        local = (((values.square() * own).sum(dim=1) + _PRIOR) / (own.sum(dim=1) + _PRIOR)).sqrt()
        rough = (rows.roughness / scales.background[rows.quantity, None])[row]  # (B, n, radii)
        error = (rows.error / scales.innovation[rows.quantity])[row]
        times = torch.zeros(batch, 1, dtype=torch.int64)
        clocks = {"second_of_day": times.float(), "day_of_year": times.float()}
        one_hot = torch.nn.functional.one_hot(rows.kind[centre], len(KINDS)).double()
        described = torch.cat(
            [
                torch.stack([rows.level[centre] / 15 - 1, local.log(), error[:, 0].log()], dim=1),
                rough[:, 0],
                one_hot,
            ],
            dim=1,
        ).float()
        inputs = self.layout.inputs["centre"].variables
        valid = torch.nn.functional.one_hot(quantity[:, 0], len(self.data.variables)).bool()[:, None, :, None]
        guess = self.interpolated(around, values) if self.reference == "interpolation" else torch.zeros_like(truth)
        scale = scales.innovation.float()[None, None, :, None]
        shape = (batch, 1, len(self.data.variables), 1)
        target = Field(
            truth.float()[:, None, None, None].expand(shape),
            self.data.variables,
            self.data.grid,
            times,
            valid=valid,
            scale=scale,
            reference=Reference(
                guess.float()[:, None, None, None].expand(shape), local.float()[:, None, None, None].expand(shape)
            ),
            **clocks,
        )
        return Batch(
            {"centre": Field(described[:, None, :, None], inputs, self.data.grid, times, **clocks)},
            {TARGET: target},
            self.layout,
            observations=self._observations(around, values / local[:, None], rough, error, times),
        )

    def _observations(
        self, around: Neighbourhoods, values: Tensor, rough: Tensor, error: Tensor, times: Tensor
    ) -> Observations:
        rows, scales, row = self.data.rows, self.statistics.scales, around.row
        sample, place = torch.nonzero(around.known, as_tuple=True)
        chosen = row[sample, place]
        quantity, centre = rows.quantity[chosen], row[sample, 0]
        distance = (around.east.square() + around.north.square()).sqrt()
        background = (rows.background / scales.background[rows.quantity])[row]
        higher = torch.where(rows.quantity[row] == rows.quantity[row[:, :1]], background - background[:, :1], 0.0)
        columns = [
            around.east / 100,
            around.north / 100,
            *((-distance / length).exp() for length in (30.0, 100.0, 300.0)),
            around.days,
            (-around.days.abs()).exp(),
            around.levels / 10,
            (-around.levels.abs() / 4).exp(),
            error.log(),
            higher,
            (-higher.abs() / 0.2).exp(),
            *(3 * rough).unbind(-1),
            *(3 * (rough - rough[:, :1])).unbind(-1),
        ]
        features = torch.stack([column[sample, place] for column in columns], dim=-1)
        return Observations(
            value=values[sample, place].float(),
            batch=sample,
            frame=torch.zeros_like(sample),
            channel=quantity * len(KINDS) + rows.kind[centre],
            platform=rows.platform[chosen],
            type=torch.zeros_like(sample),
            times=times,
            latitude=(around.north[sample, place] / KM_PER_DEGREE).float(),
            longitude=(around.east[sample, place] / KM_PER_DEGREE).float(),
            time_offset=(around.days[sample, place] * 86_400).int(),
            features=features.float(),
            second_of_day=times.float(),
            day_of_year=times.float(),
        )


def _roughness_names() -> list[str]:
    return [f"roughness_{radius:g}" for radius in RADII]
