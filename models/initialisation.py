"""Initial weights shared by all layers."""

from __future__ import annotations

from torch import Tensor, nn


def linear_(layer: nn.Linear) -> None:
    """Truncated normal of variance 1/inputs, at most 0.05 wide so that small layers start gently; biases zero."""
    nn.init.trunc_normal_(layer.weight, std=min(0.05, layer.in_features**-0.5))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def lecun_(layer: nn.Linear) -> None:
    """Truncated normal of variance 1/inputs, biases zero: attention tells its keys apart from the first step on."""
    nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def table_(table: Tensor) -> None:
    """Learned tables (latents, trainable queries): normal of width 0.02, as the Perceiver papers."""
    nn.init.trunc_normal_(table, std=0.02)


def zeros_(layer: nn.Linear) -> None:
    """A zero layer: its branch starts as nothing, so that the model starts as its reference."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def head_(layer: nn.Linear, *, zero: bool) -> None:
    """The last layer of a decoder. zero: the first prediction is the target's reference (or all classes alike)."""
    if zero:
        zeros_(layer)
    else:
        linear_(layer)


def xavier_(layer: nn.Linear) -> None:
    """Uniform Xavier weights, zero biases, as diffusion transformers start (arXiv:2212.09748)."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
