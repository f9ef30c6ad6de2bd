"""What holds tensors and can be moved, pinned and sliced as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor


class Movable:
    """Base of dataclasses of tensors: applies a function to every tensor inside."""

    def map(self, function):
        return replace(self, **{f.name: _mapped(getattr(self, f.name), function) for f in fields(self)})

    def to(self, device, non_blocking: bool = False):
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self.map(lambda tensor: tensor.pin_memory())


def _mapped(value: Any, function):
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Movable):
        return value.map(function)
    if isinstance(value, Mapping):
        return {key: _mapped(item, function) for key, item in value.items()}
    return value
