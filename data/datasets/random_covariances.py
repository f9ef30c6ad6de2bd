"""Random covariances of innovations, and kriging with them: what innovations could be like before they are seen.

An innovation is a sum of: two smooth fields (correlations of short and of long range, with their memory in time and
in depth); a field that depends on the value of the background (its errors follow its fronts); the roughness of the
background times a constant (a product smoother than the model cannot show it); an offset of each time; a constant;
noise. All amplitudes are in units of the quantity's typical innovation. Letters: B sets of parameters, n places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.covariances import exponential, gaussian, matern32
from data.datasets.neighbourhoods import Neighbourhoods, Rows

# name: (smallest, largest) of log-uniform draws. Lengths in km, times in days, depths in levels.
RANGES = {
    "short": (20.0, 200.0),
    "short_size": (0.1, 1.5),
    "short_days": (0.5, 50.0),
    "long": (100.0, 1000.0),
    "long_size": (0.1, 2.0),
    "long_days": (1.0, 100.0),
    "levels": (2.0, 40.0),
    "front": (0.1, 3.0),  # difference of the background, in its standard deviations, that matters
    "front_size": (0.02, 2.0),
    "front_length": (50.0, 1000.0),
    "near_slope": (0.01, 1.5),  # of the roughness within the smaller radius, physical: 1 removes it from the background
    "far_slope": (0.01, 1.5),
    "day_size": (0.01, 0.5),
    "constant": (0.05, 1.0),
    "noise": (0.003, 1.0),  # of the given standard deviation of the error
    "stretch": (0.5, 2.0),  # east-west lengths over north-south ones
    "together": (0.05, 1.0),  # correlation between quantities
}

SHAPES = (exponential, matern32, gaussian)  # from rough to smooth fields
DRAWS, KEPT = 60, 16  # of a round of fitting
SPREADS = (0.6, 0.3)  # of its later rounds
_UNKNOWN = 1e6  # variance of what is not known


@dataclass(frozen=True)
class RandomCovariances:
    """values: (B, len(RANGES)) logarithms; shape: (B, 2) index into `SHAPES`, of the short and the long range."""

    values: Tensor
    shape: Tensor

    @staticmethod
    def draw(number: int, generator: torch.Generator) -> RandomCovariances:
        low, high = _bounds()
        values = low + (high - low) * torch.rand(number, len(RANGES), generator=generator, dtype=torch.float64)
        return RandomCovariances(values, torch.randint(len(SHAPES), (number, 2), generator=generator))

    def __len__(self) -> int:
        return len(self.values)

    def chosen(self, which: Tensor) -> RandomCovariances:
        return RandomCovariances(self.values[which], self.shape[which])

    def joined(self, other: RandomCovariances) -> RandomCovariances:
        return RandomCovariances(torch.cat([self.values, other.values]), torch.cat([self.shape, other.shape]))

    def jittered(self, spread: float, generator: torch.Generator) -> RandomCovariances:
        """Every logarithm moved by a normal step, within its range; shapes stay."""
        low, high = _bounds()
        noise = torch.randn(self.values.shape, generator=generator, dtype=torch.float64)
        return RandomCovariances((self.values + spread * noise).clamp(low, high), self.shape)

    def __getattr__(self, name: str) -> Tensor:
        if name not in RANGES:
            raise AttributeError(name)
        return self.values[:, list(RANGES).index(name)].exp()[:, None, None]

    def matrix(self, around: Neighbourhoods, rows: Rows, scales: Scales) -> Tensor:
        """(B, n, n) covariances of the innovations without their noise, in units of their scales."""
        row = around.row
        quantity = rows.quantity[row]
        east, north = _pairs(around.east) / self.stretch, _pairs(around.north) * self.stretch
        distance = (east.square() + north.square()).sqrt()
        days, levels = _pairs(around.days).abs(), _pairs(around.levels).abs()
        same = quantity[:, :, None] == quantity[:, None, :]
        short = self.short_size.square() * self._shaped(distance / self.short, 0) * (-days / self.short_days).exp()
        long = self.long_size.square() * self._shaped(distance / self.long, 1) * (-days / self.long_days).exp()
        smooth = (short + long + self.constant.square()) * (-levels / self.levels).exp()
        covariance = smooth * torch.where(same, 1.0, self.together)
        background = (rows.background / scales.background[rows.quantity])[row]
        front = (-0.5 * (_pairs(background) / self.front).square() - distance / self.front_length).exp()
        covariance += same * self.front_size.square() * front
        rough = (rows.roughness / scales.innovation[rows.quantity, None])[row]  # (B, n, radii)
        for k, slope in enumerate((self.near_slope, self.far_slope)):
            covariance += same * slope.square() * rough[:, :, None, k] * rough[:, None, :, k]
        day = rows.time.round()[row]
        covariance += (same & (day[:, :, None] == day[:, None, :])) * self.day_size.square()
        return covariance

    def _shaped(self, ratio: Tensor, which: int) -> Tensor:
        correlation = torch.empty_like(ratio)
        for shape, function in enumerate(SHAPES):
            own = self.shape[:, which].expand(len(ratio)) == shape  # one covariance may serve all neighbourhoods
            correlation[own] = function(ratio[own])
        return correlation

    def noise_variance(self, around: Neighbourhoods, rows: Rows, scales: Scales) -> Tensor:
        """(B, n), in units of the squared scales."""
        relative = (rows.error / scales.innovation[rows.quantity])[around.row]
        return (self.noise[:, 0] * relative).square() + 1e-6


@dataclass(frozen=True)
class Scales:
    """Typical innovation and standard deviation of the background of each quantity, (quantities,), physical."""

    innovation: Tensor
    background: Tensor

    @staticmethod
    def of(rows: Rows, known: Tensor) -> Scales:
        """known: (R,) bool, the innovations that may be read; backgrounds all may."""
        quantities = range(int(rows.quantity.max()) + 1)
        innovation = [rows.innovation[known & (rows.quantity == q)].square().mean().sqrt() for q in quantities]
        return Scales(
            torch.stack(innovation), torch.stack([rows.background[rows.quantity == q].std() for q in quantities])
        )


def kriging(covariance: Tensor, noise: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """(B,) expected value of the first place, given values (B, n) where known. covariance: (B, n, n); noise: (B, n)."""
    among = covariance[:, 1:, 1:].clone()
    among.diagonal(dim1=1, dim2=2).add_(torch.where(known, noise, _UNKNOWN)[:, 1:])
    weights = torch.cholesky_solve(torch.where(known, values, 0.0)[:, 1:, None], torch.linalg.cholesky(among))[..., 0]
    return (covariance[:, 0, 1:] * known[:, 1:] * weights).sum(dim=1)


def sampled(covariance: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """(B, n) values with these covariances and noise."""
    whole = covariance.clone()
    whole.diagonal(dim1=1, dim2=2).add_(noise)
    normal = torch.randn(*noise.shape, 1, generator=generator, dtype=torch.float64)
    return (torch.linalg.cholesky(whole) @ normal)[..., 0]


def fitted(
    rows: Rows,
    known: Tensor,
    centres: Tensor,
    scales: Scales,
    *,
    generator: torch.Generator,
    start: RandomCovariances | None = None,
) -> RandomCovariances:
    """The covariances, best first, that predict known innovations (R,) at `centres` (m,) best from the others known,
    whole blocks left out. Draws (or `start`), then draws around the best of them (the cross-entropy method)."""
    around = Neighbourhoods.around(rows, centres, known)
    values = rows.innovation / scales.innovation[rows.quantity]

    def error(covariances: RandomCovariances, k: int) -> Tensor:
        one = covariances.chosen(torch.tensor([k]))
        noise = one.noise_variance(around, rows, scales)
        guess = kriging(one.matrix(around, rows, scales), noise, around.known, values[around.row])
        return (guess - values[centres]).square().mean()

    def best(covariances: RandomCovariances, errors: Tensor) -> tuple[RandomCovariances, Tensor]:
        order = errors.argsort()[:KEPT]
        return covariances.chosen(order), errors[order]

    def tried(covariances: RandomCovariances) -> tuple[RandomCovariances, Tensor]:
        return covariances, torch.stack([error(covariances, k) for k in range(len(covariances))])

    found, errors = best(*tried(RandomCovariances.draw(2 * DRAWS, generator) if start is None else start))
    for spread in SPREADS if start is None else SPREADS[-1:]:
        parents = torch.randint(len(found), (DRAWS,), generator=generator)
        new, added = tried(found.chosen(parents).jittered(spread, generator))
        found, errors = best(found.joined(new), torch.cat([errors, added]))
    return found


def _bounds() -> tuple[Tensor, Tensor]:
    return torch.tensor(list(RANGES.values()), dtype=torch.float64).log().unbind(1)


def _pairs(values: Tensor) -> Tensor:
    """(B, n) -> (B, n, n) differences."""
    return values[:, :, None] - values[:, None, :]
