"""What a sample is conditioned on as one vector: its noise level and a label. Three embedders, one signature.

edm   label and noise level are summed before the layers (Karras et al. 2022, arXiv:2206.00364)
dit   they are embedded apart and summed after the layers (Peebles and Xie 2022, arXiv:2212.09748)
zero  nothing: modulations are learned constants
Letters: B batch, Dc condition width, E width of the noise features, M label size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import Condition
from models.initialisation import xavier_, zeros_
from models.positions.tables import Tables


class NoiseFeatures(Tables):
    """Noise levels (B,) -> sines and cosines (B, E) of E / 2 frequencies from 1 to 1e-4, ends included."""

    def __init__(self, num_features: int):
        super().__init__()
        if num_features < 4 or num_features % 2:
            raise ValueError(f"model.condition.num_features={num_features} must be even and at least 4")
        count = num_features // 2
        place = torch.arange(count, device="cpu").float() / (count - 1)
        self.table("frequencies", 10_000.0**-place, persistent=True)

    def forward(self, noise_level: Tensor) -> Tensor:
        angles = noise_level.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class EDMEmbedder(nn.Module):
    """size: Dc. num_features: E. label_size: M (0: no label). label_dropout: chance to drop a sample's in training."""

    def __init__(self, *, size: int, num_features: int, label_size: int = 0, label_dropout: float = 0.0):
        super().__init__()
        self.size, self.label_size, self.label_dropout = size, label_size, label_dropout
        self.noise = NoiseFeatures(num_features)
        self.label = nn.Linear(label_size, num_features) if label_size else None
        self.up = nn.Linear(num_features, size)
        self.out = nn.Linear(size, size)
        self.initialise()

    def initialise(self) -> None:
        for layer in (self.label, self.up, self.out):
            if layer is not None:
                xavier_(layer)

    def forward(self, condition: Condition) -> Tensor:
        """(B, Dc); its consumers apply the last activation."""
        features = self.noise(condition.noise_level)
        if self.label is not None:
            label = _given_label(condition, self.label_size)
            if self.training and self.label_dropout:
                kept = torch.rand(label.shape[0], 1, device=label.device) >= self.label_dropout
                label = label * kept
            features = features + self.label(label * math.sqrt(self.label_size))
        return self.out(F.silu(self.up(features)))


class DiTEmbedder(nn.Module):
    """size: Dc. num_features: E. label_size: M (0: no label); its weights start at zero."""

    def __init__(self, *, size: int, num_features: int, label_size: int = 0):
        super().__init__()
        self.size, self.label_size = size, label_size
        self.noise = NoiseFeatures(num_features)
        self.up = nn.Linear(num_features, size)
        self.out = nn.Linear(size, size)
        self.label = nn.Linear(label_size, size, bias=False) if label_size else None
        self.initialise()

    def initialise(self) -> None:
        xavier_(self.up)
        xavier_(self.out)
        if self.label is not None:
            zeros_(self.label)

    def forward(self, condition: Condition) -> Tensor:
        """(B, Dc)"""
        embedded = self.out(F.silu(self.up(self.noise(condition.noise_level))))
        return embedded if self.label is None else embedded + self.label(_given_label(condition, self.label_size))


class ZeroEmbedder(nn.Module):
    """A condition of width 0: what it modulates becomes a learned constant."""

    size, label_size = 0, 0

    def __init__(self):
        super().__init__()

    def forward(self, condition: Condition) -> None:
        return None


def _given_label(condition: Condition, size: int) -> Tensor:
    if condition.label is None or condition.label.shape[1] != size:
        given = "none" if condition.label is None else tuple(condition.label.shape)
        raise ValueError(
            f"the model is conditioned on labels of {size} numbers and the batch has {given}; set label_size"
        )
    return condition.label
