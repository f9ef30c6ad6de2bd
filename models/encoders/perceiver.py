"""The Perceiver encoder: learned latents read all input cells of all frames through cross-attention.

Perceiver (Jaegle et al. 2021, arXiv:2103.03206), Perceiver IO (arXiv:2107.14795). Every cell of every frame is a token:
its values, their validity where gaps occur, Fourier features of its place, features of its time. Inputs on different
grids join one key/value sequence. Letters: B batch, T frames, C channels, P cells, M tokens, N latents, D hidden.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from data.batch import Batch
from data.layout import Layout
from models.attention import AttentionLayer, Modulations
from models.encoders.input_tokens import InputTokens, ObservationRows, RawTokens
from models.initialisation import table_
from models.latents import LatentLayout, Latents

SHARES = ("none", "all", "all_but_first")
FRAMES = ("joint", "each")  # the builder turns auto into one of them


class PerceiverEncoder(nn.Module):
    """Batch -> Latents without a grid.

    num_cross: cross-attentions to the same tokens, with self_per_cross self-attention layers between them.
    share_cross, share_self: none, all, or all_but_first repeats use the same weights; shared keys and values are
        computed once. frames: joint (all frames at once, one latent frame) or each (every frame on its own).
    cross_heads, num_heads: of cross- and of self-attention; likewise the widths of queries and keys (qk), of values (v)
        and of the MLP; None takes the latents' width, and cross_mlp_ratio=None the mlp_ratio.
    num_bands, spacing: of the places; calendar: what is known of the date (season_and_hour, hour, none).
    embed: false reads the values of a cell as its token: no projection, place or time (preprocessed features).
    query_residual: whether cross-attention adds to the latents or replaces them.
    Raises ValueError on values not allowed.
    """

    reads_observations = True
    accepts_modulation = True
    reads_coordinates = True

    def __init__(
        self,
        layout: Layout,
        *,
        hidden_size: int,
        num_latents: int,
        num_heads: int,
        cross_heads: int = 1,
        num_cross: int = 1,
        self_per_cross: int = 2,
        share_cross: str = "all_but_first",
        share_self: str = "all",
        mlp_ratio: float = 1.0,
        cross_mlp_ratio: float | None = None,
        mlp: str = "gelu",
        qk_width: int | None = None,
        v_width: int | None = None,
        cross_qk_width: int | None = None,
        cross_v_width: int | None = None,
        query_residual: bool = True,
        embed: bool = True,
        num_bands: int = 16,
        spacing: str = "linear",
        calendar: str = "season_and_hour",
        frames: str = "joint",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        attention: str = "auto",
        kv_mode: str = "auto",
    ):
        super().__init__()
        for name, value in (("share_cross", share_cross), ("share_self", share_self)):
            if value not in SHARES:
                raise ValueError(f"model.encoder.{name}={value} is unknown; use one of {', '.join(SHARES)}")
        if frames not in FRAMES:
            raise ValueError(f"model.encoder.frames={frames} is unknown; use one of {', '.join(FRAMES)}")
        if num_cross < 1:
            raise ValueError(f"model.encoder.num_cross={num_cross} must be at least 1")
        self.layout, self.share_cross, self.share_self = layout, share_cross, share_self
        self.num_cross = num_cross
        self.num_frames = layout.frames if frames == "each" else 1
        if frames == "each" and any(item.frames not in (1, self.num_frames) for item in layout.inputs.values()):
            raise ValueError(
                "model.encoder.frames=each needs inputs of equally many frames; use model.encoder.frames=joint"
            )
        self.frames = frames
        self.frame_local = frames == "each"
        if layout.observations is not None and not embed:
            raise ValueError("model.encoder.embed=false reads no observations; use model.encoder.embed=true")
        widths = {item.channels for item in layout.inputs.values()}
        if not embed and len(widths) > 1:
            raise ValueError(
                f"model.encoder.embed=false needs inputs of equally many channels, got {sorted(widths)}; "
                "use model.encoder.embed=true"
            )
        self.inputs = nn.ModuleDict(
            {
                name: InputTokens(item, hidden_size, num_bands=num_bands, spacing=spacing, calendar=calendar)
                if embed
                else RawTokens(item)
                for name, item in layout.inputs.items()
            }
        )
        self.observations = None
        if layout.observations is not None:
            self.observations = ObservationRows(layout.observations, hidden_size, num_bands=num_bands, spacing=spacing)
        shared = dict(mlp=mlp, dropout=dropout, attention_dropout=attention_dropout, backend=attention)
        self.latents = nn.Parameter(torch.empty(num_latents, hidden_size))
        self.cross = nn.ModuleList(
            AttentionLayer(
                hidden_size,
                hidden_size if embed else next(iter(widths)),
                num_heads=cross_heads,
                qk_width=cross_qk_width,
                v_width=cross_v_width,
                mlp_ratio=mlp_ratio if cross_mlp_ratio is None else cross_mlp_ratio,
                residual=query_residual,
                kv_mode=kv_mode,
                **shared,
            )
            for _ in range(_distinct(num_cross, share_cross))
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                AttentionLayer(
                    hidden_size,
                    num_heads=num_heads,
                    qk_width=qk_width,
                    v_width=v_width,
                    mlp_ratio=mlp_ratio,
                    **shared,
                )
                for _ in range(self_per_cross)
            )
            for _ in range(_distinct(num_cross - 1, share_self))
        )
        self.initialise()

    def initialise(self) -> None:
        table_(self.latents)

    @property
    def latent_layout(self) -> LatentLayout:
        return LatentLayout(num_tokens=self.latents.shape[0], hidden_size=self.latents.shape[1], frames=self.num_frames)

    def forward(self, batch: Batch, *, modulation: Modulations | None = None) -> Latents:
        tokens, valid = self._tokens(batch)  # (B T, M, D)
        latents = self.latents[None]  # (1, N, D), broadcast over the batch by the first cross-attention
        frames = self._frames(batch)
        film = None if modulation is None else modulation.repeated(frames)
        contexts = {}
        for index in range(self.num_cross):
            which = _which(index, len(self.cross), self.share_cross)
            if which not in contexts:
                contexts[which] = self.cross[which].prepare(tokens, mask=valid, num_queries=latents.shape[1])
            latents = self.cross[which](latents, contexts[which], modulation=film)
            if index + 1 < self.num_cross:
                for layer in self.blocks[_which(index, len(self.blocks), self.share_self)]:
                    latents = layer(latents, modulation=film)
        return Latents(
            tokens=rearrange(latents, "(b t) n d -> b t n d", t=frames),
            times=batch.clock.times[:, -frames:],
            frames=(batch.first_frame, self.num_frames),
        )

    def _frames(self, batch: Batch) -> int:
        """Latent frames of this batch, which may hold some of the window's only."""
        return batch.num_frames if self.frames == "each" else 1

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        tokens, valid = [], []
        for name, field in batch.inputs.items():
            given, present = self.inputs[name](field, batch.base_time)
            if present is None:
                present = torch.ones(given.shape[:3], dtype=torch.bool, device=given.device)
            tokens.append(self._by_frame(given, batch))
            valid.append(self._by_frame(present, batch))
        complete = all(field.presence is None for field in batch.inputs.values()) and self.observations is None
        if self.observations is not None:
            rows, present = self.observations(batch.observations, batch.base_time, each=self.frames == "each")
            tokens.append(rows)
            valid.append(present)
        joined = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
        return joined, None if complete else torch.cat(valid, dim=1)

    def _by_frame(self, tokens: Tensor, batch: Batch) -> Tensor:
        """(B, T, P, ...) -> (B, T P, ...) where frames are read jointly, (B T, P, ...) where each is read alone."""
        if self.frames == "joint":
            return tokens.flatten(1, 2)
        return tokens.expand(-1, batch.num_frames, *tokens.shape[2:]).flatten(0, 1)


def _distinct(repeats: int, share: str) -> int:
    """How many sets of weights `repeats` uses need."""
    return min(repeats, {"none": repeats, "all": 1, "all_but_first": 2}[share])


def _which(index: int, distinct: int, share: str) -> int:
    return 0 if share == "all" else min(index, distinct - 1)
