"""What the input holds at the very frame that is asked for, as a query: a filled day knows what was seen that day.

Perceiver IO (arXiv:2107.14795), section 3.2: the input itself as the query, here a patch of it for each latent cell.
Letters: B batch, L target times, C channels of a frame, N latent cells, D hidden.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from data.batch import Query
from data.layout import Layout
from models.patches import Patches


class FrameQueries(nn.Module):
    """Query -> (B, L, N, D), for a target whose times are times of input frames, on the grid of some input.

    window: where the target's grid lies in that of the patches.
    """

    def __init__(self, layout: Layout, target: str, patches: Patches, window: tuple[slice, ...], hidden_size: int):
        super().__init__()
        self.patches, self.window = patches, window
        times, channels, offset = layout.frames_of(target), [], 0
        for item in (layout.inputs[name] for name in layout.windows[target]):
            own = torch.arange(item.frames * item.channels, device="cpu").view(item.frames, item.channels) + offset
            if item.frames in (1, layout.frames):  # one frame stands for all
                channels.append(own[times if item.frames > 1 else [0] * len(times)])
            offset += own.numel()
        self.register_buffer("channels", torch.cat(channels, dim=1), persistent=False)  # (L, C)
        self.embed = nn.Conv2d(self.channels.shape[1], hidden_size, patches.size, stride=patches.size)

    @staticmethod
    def possible(layout: Layout, target: str) -> bool:
        """Whether an input holds the target's grid at each of its times."""
        whole = any(layout.inputs[name].frames == layout.frames for name in layout.windows[target])
        return whole and layout.frames_of(target) is not None

    def forward(self, query: Query) -> Tensor:
        frames = query.features[:, self.channels]  # (B, L, C, *query.grid.shape)
        images = frames.new_zeros(*frames.shape[:3], *self.patches.grid.shape)
        images[..., *self.window] = frames
        cells = self.embed(self.patches.pad(images.flatten(0, 1)))
        return rearrange(cells, "(b l) d h w -> b l (h w) d", b=len(frames))
