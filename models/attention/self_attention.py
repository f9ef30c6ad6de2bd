"""Self-attention with one fused query-key-value projection: over the tokens of a frame, or over the frames of a place.

Both normalise queries and keys per head where asked (`qk_norm`), before any rotation, under every backend.
Letters: B batch, T frames, X tokens of a frame, D hidden, h heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels.head_norm import head_norm
from kernels.temporal_attention import temporal_attention
from models.attention.backends import BACKENDS, attend
from models.attention.disk import Disk
from models.initialisation import xavier_
from models.positions.rotary import FrameRotary
from models.resharding import Resharding

QK_NORMS = ("rms", "layer", "none")


class HeadNorm(nn.Module):
    """Normalises (..., d) heads. kind: layer, or rms, which `head_norm` computes of queries and keys at once with this
    weight. affine: with learned scale (and shift)."""

    def __init__(self, kind: str, head_width: int, *, affine: bool):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(head_width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(head_width)) if affine and kind == "layer" else None

    def forward(self, heads: Tensor) -> Tensor:
        assert self.kind == "layer"
        weight, bias = (None if part is None else part.to(heads.dtype) for part in (self.weight, self.bias))
        return F.layer_norm(heads, heads.shape[-1:], weight, bias, eps=1e-5)


class _Projections(nn.Module):
    """What spatial and temporal attention share."""

    def __init__(self, hidden_size: int, *, num_heads: int, qk_norm: str, qk_norm_affine: bool):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by {num_heads} heads; change model.num_heads")
        if qk_norm not in QK_NORMS:
            raise ValueError(f"model.processor.qk_norm={qk_norm} is unknown; use one of {', '.join(QK_NORMS)}")
        self.num_heads, self.head_width = num_heads, hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.query_norm = self.key_norm = None
        if qk_norm != "none":
            self.query_norm = HeadNorm(qk_norm, self.head_width, affine=qk_norm_affine)
            self.key_norm = HeadNorm(qk_norm, self.head_width, affine=qk_norm_affine)
        self.initialise()

    def initialise(self) -> None:
        xavier_(self.qkv)
        xavier_(self.output)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> three of (..., h, d)."""
        packed = rearrange(self.qkv(x), "... (s h d) -> ... s h d", s=3, h=self.num_heads)
        norms = self.query_norm, self.key_norm
        if self.query_norm is not None and self.query_norm.kind == "rms":
            weight = None if self.query_norm.weight is None else torch.stack([norm.weight for norm in norms])
            return head_norm(packed, weight)
        query, key, value = packed.unbind(-3)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value


class SpatialAttention(_Projections):
    """Softmax attention among the tokens of each frame: (B, T, X, D) -> (B, T, X, D).

    disk: which tokens a token reads, shared by the layers of a model; None: all of its frame.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        qk_norm: str = "rms",
        qk_norm_affine: bool = False,
        disk: Disk | None = None,
        backend: str = "auto",
    ):
        super().__init__(hidden_size, num_heads=num_heads, qk_norm=qk_norm, qk_norm_affine=qk_norm_affine)
        if backend not in BACKENDS:
            raise ValueError(f"unknown attention backend {backend!r}; use model.attention={'|'.join(BACKENDS)}")
        self.disk, self.backend = disk, backend

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """valid: (B, T, X) bool, True = attend to it; masked tokens must be finite."""
        frames = x.shape[1]
        heads = [rearrange(part, "b t x h d -> (b t) h x d") for part in self.heads(x)]
        mask = None if valid is None else rearrange(valid, "b t x -> (b t) x")
        among = attend if self.disk is None else self.disk.attend
        mixed = among(*heads, scale=self.head_width**-0.5, key_mask=mask, backend=self.backend)
        return self.output(rearrange(mixed, "(b t) h x d -> b t x (h d)", t=frames))


class TemporalAttention(_Projections):
    """Attention among the frames of each place: (B, T, X, D) -> (B, T, X, D).

    num_frames: of the whole sequence. softmax: off, the scaled products themselves are the weights (linear, signed).
    causal: no frame reads a later one; window: nor one `window` or more frames ago (None: all). rotary_base: of the
    rotation by frame index, None for none. path: of `kernels.temporal_attention`. Queries and keys are not normalised.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_frames: int,
        softmax: bool = False,
        causal: bool = True,
        window: int | None = None,
        rotary_base: float | None = 100.0,
        path: str = "auto",
    ):
        super().__init__(hidden_size, num_heads=num_heads, qk_norm="none", qk_norm_affine=False)
        if window is not None and (window < 1 or not causal):
            raise ValueError(
                f"model.processor.window={window} must be at least 1 and needs model.processor.causal=true; "
                "null reads all frames"
            )
        self.softmax, self.causal, self.window, self.path = softmax, causal, window, path
        self.rotary = None if rotary_base is None else FrameRotary(num_frames, self.head_width, rotary_base)
        self.resharding = Resharding()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, X, D), the frames that this rank holds."""
        return self.resharding(x, self._among_frames)

    def _among_frames(self, x: Tensor) -> Tensor:
        """x: all frames of the sequence, of the places that this rank mixes."""
        qkv = rearrange(self.qkv(x), "b t x (s h d) -> b t x s h d", s=3, h=self.num_heads)
        rotation = None if self.rotary is None else (self.rotary.cos, self.rotary.sin)
        mixed = temporal_attention(
            qkv, rotation, softmax=self.softmax, causal=self.causal, window=self.window, path=self.path
        )
        return self.output(rearrange(mixed, "b t x h d -> b t x (h d)"))
