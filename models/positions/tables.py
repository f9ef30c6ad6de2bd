"""Constant tables of positions and times that stay in their precision whatever the model is cast to."""

from __future__ import annotations

from torch import Tensor, nn


class Tables(nn.Module):
    """Holds constants as buffers that move with the model but keep their dtype.

    `model.bfloat16()` rounds ordinary buffers: seconds of a day or angles of a rotation are useless after that.
    """

    def table(self, name: str, values: Tensor | None, *, persistent: bool = False) -> None:
        self.register_buffer(name, values, persistent=persistent)

    def _apply(self, fn, recurse: bool = True):
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
