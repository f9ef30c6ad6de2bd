"""The cases of the Perceiver benchmark: shapes that every implementation builds alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One model and its input (B, tokens, channels), already carrying position features.

    One cross-attention to `latents` x `width`, `self_layers` self-attention layers, then `queries` trainable queries of
    the same width decode `outputs` channels. With `cross_layers` > 1 the encoder repeats: cross-attention (the first
    with its own weights, the others sharing theirs) and `self_layers` layers of one shared block, then the mean over
    latents; nothing is decoded. Width 6 GELU MLPs count as many weights as lucidrains' GEGLU with factor 4.
    """

    name: str
    batch: int
    tokens: int
    channels: int
    latents: int
    cross_heads: int
    queries: int = 0
    outputs: int = 3
    width: int = 256
    self_heads: int = 8
    self_layers: int = 6
    cross_layers: int = 1
    widening: int = 6

    @property
    def repeats(self) -> bool:
        return self.cross_layers > 1


CASES = {
    case.name: case
    for case in (
        Case("image_h1", batch=4, tokens=4096, channels=133, latents=128, cross_heads=1, queries=4096),
        Case("image_h8", batch=4, tokens=4096, channels=133, latents=128, cross_heads=8, queries=4096),
        Case("long_h1", batch=1, tokens=50_176, channels=261, latents=256, cross_heads=1, queries=64),
        Case("long_h8", batch=1, tokens=50_176, channels=261, latents=256, cross_heads=8, queries=64),
        Case("rep_h8", batch=1, tokens=16_384, channels=133, latents=256, cross_heads=8, cross_layers=4, self_layers=2),
    )
}
