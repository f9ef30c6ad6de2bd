"""A video transformer: attention within frames, to observations, and among frames, each a gated residual branch.

The backbone of HealDA v2 (PhysicsNeMo 2.2, `VideoDiT`; adaLN-Zero of arXiv:2212.09748). It knows nothing of the grid.
Letters: B batch, T frames, N tokens of a frame, D hidden, Dc condition width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.layout import Layout
from kernels.modulated_norm import gated, gated_norm, modulated_norm
from models.attention.disk import Disk
from models.attention.layer import MLP, Modulation
from models.attention.pixel import PixelCrossAttention
from models.attention.self_attention import SpatialAttention, TemporalAttention
from models.conditioning.adaptive_norm import AdaptiveNorm
from models.frame_dropout import draw_key, frame_dropout
from models.initialisation import xavier_
from models.latents import LatentLayout, Latents, ObservationContext

BRANCHES = 4  # spatial, observations, temporal, MLP: the gates that drop path may close


class VideoDiT(nn.Module):
    """Latents -> Latents of the same shape, `depth` blocks.

    temporal: whether frames attend to each other; softmax: by softmax, or by the scaled products themselves (HealDA);
    causal, window: which frames a frame reads (`TemporalAttention`); rotary_base: of the rotation by frame index, None
    for none.
    radius: degrees (great circle) within which a token reads others of its frame (`Disk`), None for everywhere.
    qk_norm: of queries and keys in spatial attention, rms, layer or none; qk_norm_affine: with learned scale.
    observation_heads, observation_kv_heads, observation_head_dim, projection_bias: of the attention to observations.
    drop_path: chance that a sample skips a branch in training; the first drop_path_from blocks never do.
    dropout: of the MLP's output. checkpoint: blocks whose activations are recomputed in the backward pass: all, none
    or the number of last ones.
    """

    accepts_context = True
    accepts_modulation = True
    has_time_axis = True
    frame_local = True  # but for temporal attention, which reshards

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        temporal: bool = True,
        softmax: bool = False,
        causal: bool = True,
        window: int | None = None,
        rotary_base: float | None = 100.0,
        radius: float | None = None,
        qk_norm: str = "rms",
        qk_norm_affine: bool = False,
        observation_heads: int = 64,
        observation_kv_heads: int = 2,
        observation_head_dim: int = 32,
        projection_bias: bool = True,
        drop_path: float = 0.0,
        drop_path_from: int = 0,
        dropout: float = 0.0,
        checkpoint: str | int = "none",
        attention: str = "auto",
    ):
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"model.processor.drop_path={drop_path} must be at least 0 and below 1")
        self.latent_layout = latent_layout
        if not 0 <= dropout < 1:
            raise ValueError(f"model.processor.dropout={dropout} must be at least 0 and below 1")
        self.drop_path, self.drop_path_from, self.dropout = drop_path, drop_path_from, dropout
        self.recomputed = _recomputed(checkpoint, depth)
        disk = None if radius is None else Disk(latent_layout.coordinates, radius)  # one for all blocks
        hidden, observed = latent_layout.hidden_size, latent_layout.observation_size

        def temporal_attention() -> TemporalAttention:
            return TemporalAttention(
                hidden,
                num_heads=num_heads,
                num_frames=latent_layout.frames,
                softmax=softmax,
                causal=causal,
                window=window,
                rotary_base=rotary_base,
            )

        def observation_attention() -> PixelCrossAttention:
            return PixelCrossAttention(
                hidden,
                observed,
                num_heads=observation_heads,
                num_kv_heads=observation_kv_heads,
                head_dim=observation_head_dim,
                bias=projection_bias,
            )

        self.blocks = nn.ModuleList(
            VideoDiTBlock(
                hidden,
                latent_layout.condition_size,
                spatial=SpatialAttention(
                    hidden,
                    num_heads=num_heads,
                    qk_norm=qk_norm,
                    qk_norm_affine=qk_norm_affine,
                    disk=disk,
                    backend=attention,
                ),
                observations=observation_attention() if observed else None,
                temporal=temporal_attention() if temporal else None,
                mlp_ratio=mlp_ratio,
            )
            for _ in range(depth)
        )

    def forward(self, latents: Latents) -> Latents:
        tokens, valid, context = latents.tokens, latents.valid, latents.context
        if valid is not None:
            tokens = torch.where(valid[..., None], tokens, 0.0)  # finite, whatever was masked
        if context is not None and self.blocks[0].observations is not None:
            context = self.blocks[0].observations.planned(context)
        keep = self._kept_branches(tokens)
        key = draw_key(tokens.device) if self.training and self.dropout > 0 else None
        for index, block in enumerate(self.blocks):
            dropped = None
            if key is not None:
                dropped = partial(
                    frame_dropout, share=self.dropout, key=key, layer=index, first_frame=latents.frames[0]
                )
            kept = None if keep is None else keep[index]
            film = None if latents.modulation is None else latents.modulation.of(block)
            arguments = (tokens, latents.condition, valid, context, kept, dropped, film)
            if index in self.recomputed and self.training:
                tokens = checkpoint(block, *arguments, use_reentrant=False)
            else:
                tokens = block(*arguments)
        return latents.with_tokens(tokens)

    def _kept_branches(self, tokens: Tensor) -> Tensor | None:
        """(depth, branches, B) factors of the gates in training, 0 where drop path closes one; None: all 1.

        Drawn at once, before anything whose shape depends on how frames are spread over ranks.
        """
        if not self.training or self.drop_path == 0:
            return None
        shape = (len(self.blocks), BRANCHES, tokens.shape[0])
        keep = (torch.rand(shape, device=tokens.device) >= self.drop_path).float() / (1 - self.drop_path)
        keep[: self.drop_path_from] = 1.0
        return keep


class VideoDiTBlock(nn.Module):
    """Four pre-norm branches, x + gate * branch((1 + scale) * norm(x) + shift); attention to observations and among
    frames only where there is such a part. FiLM, where it is given, adds to scale and shift. number: its place in
    `Modulations`, set by the builder."""

    number: int | None = None

    def __init__(
        self,
        hidden_size: int,
        condition_size: int,
        *,
        spatial: SpatialAttention,
        observations: PixelCrossAttention | None,
        temporal: TemporalAttention | None,
        mlp_ratio: float,
    ):
        super().__init__()
        self.film_width = hidden_size
        self.norm = AdaptiveNorm(condition_size, hidden_size, parts=6)  # spatial attention, then MLP
        self.spatial = spatial
        self.observations = observations
        if observations is not None:
            self.observations_norm = AdaptiveNorm(condition_size, hidden_size, parts=3)
        self.temporal = temporal
        if temporal is not None:
            self.temporal_norm = AdaptiveNorm(condition_size, hidden_size, parts=3)
        self.mlp = MLP(hidden_size, ratio=mlp_ratio, activation="gelu_tanh")
        self.initialise()

    def initialise(self) -> None:
        xavier_(self.mlp.up)
        xavier_(self.mlp.down)

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None,
        valid: Tensor | None,
        context: ObservationContext | None,
        keep: Tensor | None,
        dropped: Callable[[Tensor], Tensor] | None = None,
        film: Modulation | None = None,
    ) -> Tensor:
        """x: (B, T, N, D). keep: (branches, B) factors of the gates, or None. dropped: dropout of the MLP's output.

        film: one lead time a sample, (B, 1, D).
        """
        batch = x.shape[0]

        def gate(values: Tensor, branch: int) -> Tensor:
            return values if keep is None else values * keep[branch][:, None].to(values.dtype)

        def attended(shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            if film is None:
                return shift, scale
            return shift + film.attention_shift[:, 0], scale + film.attention_scale[:, 0]

        shift, scale, opened, mlp_shift, mlp_scale, mlp_opened = self.norm(condition, batch)
        branch = self.spatial(modulated_norm(x, *attended(shift, scale)), valid=valid)
        opened = gate(opened, 0)
        if self.observations is not None:
            shift, scale, next_opened = self.observations_norm(condition, batch)
            x, normed = gated_norm(x, opened, branch, *attended(shift, scale))
            branch, opened = self.observations(normed, context), gate(next_opened, 1)
        if self.temporal is not None:
            shift, scale, next_opened = self.temporal_norm(condition, batch)
            x, normed = gated_norm(x, opened, branch, *attended(shift, scale))
            branch, opened = self.temporal(normed), gate(next_opened, 2)
        if film is not None:
            mlp_shift, mlp_scale = mlp_shift + film.mlp_shift[:, 0], mlp_scale + film.mlp_scale[:, 0]
        x, normed = gated_norm(x, opened, branch, mlp_shift, mlp_scale)
        hidden = self.mlp(normed)
        return gated(x, gate(mlp_opened, 3), hidden if dropped is None else dropped(hidden))


def _recomputed(option: str | int, depth: int) -> range:
    """Indices of the blocks whose activations are recomputed."""
    if option == "all":
        return range(depth)
    if option == "none":
        return range(0)
    if isinstance(option, int) and option >= 0:
        return range(max(0, depth - option), depth)
    raise ValueError(f"model.processor.checkpoint={option} must be all, none or the number of last blocks")
