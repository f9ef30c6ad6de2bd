"""FiLM from lead times: every norm is scaled and shifted by how far ahead a prediction looks.

    (1 + gamma) * LN(x) + beta        gamma, beta = Linear(GELU(Linear(features of the lead time)))

FiLM (Perez et al. 2018, arXiv:1709.07871) as in MetNet-2 (arXiv:2111.07470: a generator a block, one-hot lead times)
and MetNet-3 (arXiv:2306.06079: one narrow generator for all). Here the identity at the start, and lead times are
continuous and of each sample. Letters: B batch, L lead times, F features, S trained lead times, D width of a norm.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.layout import Layout, TargetLayout
from models.attention import Modulation, Modulations
from models.attention.layer import modulated
from models.initialisation import linear_, zeros_
from models.positions.fourier import fourier_features
from models.positions.tables import Tables

FEATURES = ("onehot", "fourier", "both")
GENERATORS = ("shared", "per_block")


class LeadTimeFeatures(Tables):
    """Seconds (...) -> (..., size).

    onehot: one entry a trained lead time; between two of them both count, in proportion; beyond them the outer one.
    fourier: raw, sines and cosines of num_bands half turns over the trained range, on a scale that is linear up to the
        shortest lead time and logarithmic after it. both: one after the other.
    lead_times: the trained ones, seconds. Raises ValueError for other kinds.
    """

    def __init__(self, lead_times: Sequence[int], *, kind: str, num_bands: int = 4):
        super().__init__()
        if kind not in FEATURES:
            raise ValueError(f"model.decoder.lead_features={kind} is unknown; use one of {', '.join(FEATURES)}")
        self.kind = kind
        known = torch.tensor(sorted(set(lead_times)), dtype=torch.float32, device="cpu")
        unit = float(known[known != 0].abs().min()) if known.any() else 1.0
        self.table("known", known)
        self.table("unit", torch.tensor(unit, device="cpu"))
        self.table("bands", torch.arange(1, num_bands + 1, device="cpu") / 2)
        sizes = {"onehot": known.numel(), "fourier": 1 + 2 * num_bands}
        self.size = sum(sizes.values()) if kind == "both" else sizes[kind]

    def forward(self, lead_time: Tensor) -> Tensor:
        parts = []
        if self.kind != "fourier":
            parts.append(self._onehot(lead_time))
        if self.kind != "onehot":
            low, high = (self._compressed(self.known[end]) for end in (0, -1))
            place = 2 * (self._compressed(lead_time) - low) / (high - low).clamp(min=1e-3) - 1
            parts.append(fourier_features(place[..., None], [self.bands]))
        return torch.cat(parts, dim=-1)

    def _compressed(self, lead_time: Tensor) -> Tensor:
        return torch.asinh(lead_time.float() / self.unit)

    def _onehot(self, lead_time: Tensor) -> Tensor:
        known = self.known
        lead_time = lead_time.float().clamp(known[0], known[-1])
        if len(known) == 1:
            return torch.ones_like(lead_time)[..., None]
        numbers = torch.arange(len(known), device=known.device)
        upper = torch.searchsorted(known, lead_time.contiguous()).clamp(min=1, max=len(known) - 1)
        share = (lead_time - known[upper - 1]) / (known[upper] - known[upper - 1])
        after, before = numbers == upper[..., None], numbers == upper[..., None] - 1
        return after * share[..., None] + before * (1 - share[..., None])


class TokenFiLM(nn.Module):
    """(1 + gamma) * tokens + beta, (B, n, D): for parts without a layer to modulate (MetNet-3 modulates its inputs)."""

    number: int | None = None

    def __init__(self, width: int):
        super().__init__()
        self.film_width = width

    def forward(self, tokens: Tensor, modulation: Modulations) -> Tensor:
        own = modulation.of(self)
        return modulated(tokens, own.attention_scale, own.attention_shift)


class LeadTimeFiLM(nn.Module):
    """Lead times (B,) or (B, L) in seconds, one for each sample or L of them -> (B, L, D) for each layer.

    layers: what is modulated, with a `film_width` D each; they are numbered here. lead_times: the trained ones,
        seconds. features: see `LeadTimeFeatures`. hidden: width of the generator.
    generator: shared (layers of one width get the same scale and shift, in both branches; MetNet-3) or per_block (each
        layer and branch its own; MetNet-2). token_width: also modulates tokens of this width (`tokens`).
    Raises ValueError where a value is not allowed.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        lead_times: Sequence[int],
        features: str = "fourier",
        hidden: int = 8,
        generator: str = "shared",
        token_width: int | None = None,
    ):
        super().__init__()
        if generator not in GENERATORS:
            raise ValueError(f"model.decoder.film={generator} is unknown; use one of {', '.join(GENERATORS)}")
        if hidden < 1:
            raise ValueError(f"model.decoder.film_hidden={hidden} must be at least 1, like model.decoder.film_hidden=8")
        self.features = LeadTimeFeatures(lead_times, kind=features)
        self.trunk = nn.Linear(self.features.size, hidden)
        self.tokens = None if token_width is None else TokenFiLM(token_width)
        layers = [*layers, *([] if self.tokens is None else [self.tokens])]
        for number, layer in enumerate(layers):
            layer.number = number
        widths = [layer.film_width for layer in layers]
        shared = generator == "shared"
        distinct = list(dict.fromkeys(widths)) if shared else list(widths)
        self.parts = 2 if shared else 4
        self.heads = nn.ModuleList(nn.Linear(hidden, self.parts * width) for width in distinct)
        self.head_of = [distinct.index(width) if shared else layer for layer, width in enumerate(widths)]
        self.initialise()

    @staticmethod
    def layers_of(*parts: nn.Module) -> list[nn.Module]:
        """The layers that a lead time modulates in those of these parts that let it (`accepts_modulation`)."""
        willing = [part for part in parts if getattr(part, "accepts_modulation", False)]
        return [module for part in willing for module in part.modules() if hasattr(module, "film_width")]

    def initialise(self) -> None:
        linear_(self.trunk)
        for head in self.heads:
            zeros_(head)  # every lead time starts with the plain norm

    def forward(self, lead_time: Tensor) -> Modulations:
        lead_time = lead_time[:, None] if lead_time.ndim == 1 else lead_time
        features = self.features(lead_time).to(self.trunk.weight.dtype)
        hidden = nn.functional.gelu(self.trunk(features))
        made = [head(hidden).chunk(self.parts, dim=-1) for head in self.heads]
        films = [Modulation(*(parts * (4 // self.parts))) for parts in made]  # (scale, shift) of both branches
        return Modulations(tuple(films[number] for number in self.head_of))


def warn_beyond_training(trained: Layout, given: Layout) -> None:
    """Warns of the lead times of a layout that lie outside the range that a model of another one was trained on."""
    if torch.compiler.is_compiling():
        return
    for name, target in given.targets.items():
        known = trained.targets.get(name)
        if not isinstance(known, TargetLayout) or known.feeds:  # reached in steps, of which there may be any number
            continue
        shortest, longest = known.trained_lead_times[0], known.trained_lead_times[-1]
        beyond = [lead for lead in target.lead_times if not shortest <= lead <= longest]
        if beyond:
            times = " and ".join(_spoken(lead) for lead in beyond)
            warnings.warn(
                f"the lead time{'s' * (len(beyond) > 1)} of {times} of target {name!r} lie outside what the model was "
                f"trained on ({_spoken(shortest)} to {_spoken(longest)}); train with a wider task.training_lead_times",
                stacklevel=2,
            )


def _spoken(seconds: int) -> str:
    return f"{seconds / 60:g} min" if seconds % 3600 else f"{seconds // 3600} h"
