"""The pre-norm attention layer that all parts are made of (Perceiver, arXiv:2103.03206, section 3; spec of its peers).

    y = x + attention(norm(x), norm(context))
    z = y + mlp(norm(y))

With `post_norm`, as in the first transformers (arXiv:1706.03762), self-attention instead: y = norm(x + attention(x)),
z = norm(y + mlp(y)).

Letters: B batch, n queries, m context tokens, D query width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from models.attention.multi_head import Context, MultiHeadAttention, masked_to_zero
from models.initialisation import linear_


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "geglu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "squared_relu": squared_relu,
}
NORM_EPS = 1e-5


@dataclass(frozen=True)
class Modulation:
    """FiLM after a norm, (1 + scale) * norm(x) + shift, for both branches.

    Each (B, L, D): L conditions (lead times) a sample, of which each modulates n / L consecutive queries.
    """

    attention_scale: Tensor
    attention_shift: Tensor
    mlp_scale: Tensor
    mlp_shift: Tensor

    def repeated(self, groups: int) -> Modulation:
        """For queries in groups that are folded into the batch, sample-major: (B groups, L, D)."""
        return Modulation(*(repeat(part, "b l d -> (b g) l d", g=groups) for part in vars(self).values()))


@dataclass(frozen=True)
class Modulations:
    """FiLM of all the layers that a condition reaches; each takes its own by its number."""

    of_layers: tuple[Modulation, ...]

    def of(self, layer: nn.Module) -> Modulation:
        return self.of_layers[layer.number]

    def repeated(self, groups: int) -> Modulations:
        """As of one `Modulation`."""
        again = {id(item): item.repeated(groups) for item in self.of_layers}
        return Modulations(tuple(again[id(item)] for item in self.of_layers))


def modulated(normed: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(B, n, D) under L conditions (B, L, D), condition-major."""
    groups = rearrange(normed, "b (l s) d -> b l s d", l=scale.shape[1])
    return rearrange(torch.addcmul(shift[:, :, None], groups, 1 + scale[:, :, None]), "b l s d -> b (l s) d")


class MLP(nn.Module):
    """Linear, activation, Linear with hidden width ratio * dim. geglu gates the first half by GELU of the second."""

    def __init__(self, dim: int, *, ratio: float, activation: str = "gelu", bias: bool = True):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown mlp {activation!r}; use model.mlp={'|'.join(ACTIVATIONS)}")
        hidden = round(dim * ratio)
        self.gated = activation == "geglu"
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(dim, 2 * hidden if self.gated else hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.initialise()

    def initialise(self) -> None:
        linear_(self.up)
        linear_(self.down)

    def forward(self, x: Tensor, *, readout: nn.Linear | None = None) -> Tensor:
        """readout: applies its weight (not its bias) to the result by multiplying the two matrices first."""
        hidden = self.activated(self.up(x))
        if readout is None:
            return self.down(hidden)
        return F.linear(hidden, readout.weight @ self.down.weight, readout.weight @ self.down.bias)

    def activated(self, hidden: Tensor) -> Tensor:
        """What `up` returns -> what `down` reads."""
        if not self.gated:
            return self.activation(hidden)
        value, gate = hidden.chunk(2, dim=-1)
        return value * self.activation(gate)


class AttentionLayer(nn.Module):
    """Pre-norm attention and MLP: x (B, n, D) [, context (B, m, C)] -> (B, n, D).

    context_dim: None makes it self-attention, whose one norm serves queries and keys.
    mlp_ratio: widening of the MLP; mlp: one of ACTIVATIONS. residual: whether x is added to what attention returns (the
    MLP's residual is always on). dropout: of both branches' outputs; attention_dropout: of attention weights;
    drop_path: chance that a sample skips a branch in training. number: its place in `Modulations`, set by the builder.
    post_norm: norms after the residual sums (self-attention only).
    """

    number: int | None = None

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        *,
        num_heads: int,
        qk_width: int | None = None,
        v_width: int | None = None,
        mlp_ratio: float = 1.0,
        mlp: str = "gelu",
        residual: bool = True,
        qkv_bias: bool = True,
        output_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        backend: str = "auto",
        kv_mode: str = "auto",
        post_norm: bool = False,
    ):
        super().__init__()
        assert not post_norm or (context_dim is None and residual)
        self.post_norm = post_norm
        self.film_width = dim
        self.residual, self.drop_path = residual, drop_path
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.context_norm = None if context_dim is None else nn.LayerNorm(context_dim, eps=NORM_EPS)
        self.attention = MultiHeadAttention(
            dim,
            context_dim,
            num_heads=num_heads,
            qk_width=qk_width,
            v_width=v_width,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            qk_norm=qk_norm,
            dropout=attention_dropout,
            backend=backend,
            kv_mode=kv_mode,
        )
        self.mlp_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLP(dim, ratio=mlp_ratio, activation=mlp)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | Context | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        modulation: Modulation | Modulations | None = None,
        readout: nn.Linear | None = None,
    ) -> Tensor:
        """mask: (B, m) bool, True = keep (of the context, or of x itself in self-attention).

        x may have batch 1 where the context has B: queries that all samples share. readout: a linear layer of the
        result, (B, n, E) is then returned; it is folded into the MLP where that takes fewer multiplications.
        """
        if isinstance(modulation, Modulations):
            modulation = modulation.of(self)
        if self.post_norm:
            assert context is None and readout is None
            return self._post_norm(masked_to_zero(x, mask), mask, bias, rotary, modulation)
        if self.context_norm is None:
            x = masked_to_zero(x, mask)
        elif not isinstance(context, Context):
            context = self.prepare(context, mask=mask, num_queries=x.shape[1])
        normed = self.query_norm(x)
        if modulation is not None:
            normed = modulated(normed, modulation.attention_scale, modulation.attention_shift)
        if self.context_norm is None:
            attended = self.attention(normed, mask=mask, bias=bias, rotary=rotary)
        else:
            attended = self.attention(normed, context, bias=bias)
        attended = self._branch(attended)
        y = x + attended if self.residual else attended
        normed = self.mlp_norm(y)
        if modulation is not None:
            normed = modulated(normed, modulation.mlp_scale, modulation.mlp_shift)
        if readout is None:
            return y + self._branch(self.mlp(normed))
        if self._readout_folds(readout):
            return readout(y) + self.mlp(normed, readout=readout)
        return readout(y + self._branch(self.mlp(normed)))

    def _post_norm(
        self,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        modulation: Modulation | None,
    ) -> Tensor:
        y = self.query_norm(x + self._branch(self.attention(x, mask=mask, bias=bias, rotary=rotary)))
        if modulation is not None:
            y = modulated(y, modulation.attention_scale, modulation.attention_shift)
        z = self.mlp_norm(y + self._branch(self.mlp(y)))
        return z if modulation is None else modulated(z, modulation.mlp_scale, modulation.mlp_shift)

    def _readout_folds(self, readout: nn.Linear) -> bool:
        """Whether the readout may skip the branch's width (dropout acts on it) and is narrow enough to gain by it."""
        untouched = not self.training or (self.dropout.p == 0 and self.drop_path == 0)
        return untouched and readout.out_features < readout.in_features

    def prepare(self, context: Tensor, *, mask: Tensor | None = None, num_queries: int) -> Context:
        """Normalises the context (B, m, C) and computes its keys and values, once for several calls."""
        norm = self.context_norm
        standardised = F.layer_norm(masked_to_zero(context, mask), norm.normalized_shape, eps=norm.eps)
        affine = (norm.weight, norm.bias)
        return self.attention.prepare(standardised, mask=mask, num_queries=num_queries, affine=affine)

    def _branch(self, branch: Tensor) -> Tensor:
        branch = self.dropout(branch)
        if not self.training or self.drop_path == 0:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * keep.to(branch.dtype) / (1 - self.drop_path)
