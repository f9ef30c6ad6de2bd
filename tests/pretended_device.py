"""A device that this machine does not have: tensors say that they are on it, and are computed on the CPU.

What a GPU would refuse is refused: an operation on tensors of both devices, and lists of indices or arrays that PyTorch
would have to copy there behind one's back. The device is registered for the rest of a process.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretended"
backend_registration._setup_privateuseone_for_python_backend(NAME)
getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
DEVICE = torch.device(NAME, 0)
MIXES = ("aten::index.Tensor", "aten::index_put", "aten::_index_put", "aten::copy_")  # a GPU does that


class There(torch.Tensor):
    """held: its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, held: Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: Tensor):
        self.held = held

    def __repr__(self):
        return f"There({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """Tensors can be made on, and moved to, `DEVICE`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, There) for tensor in tensors)
    asked = kwargs.get("device")
    if asked is not None:
        there = torch.device(asked).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif there and not function.name().startswith(MIXES):
        for tensor in tensors:
            if not isinstance(tensor, There) and tensor.ndim > 0:
                raise AssertionError(f"{function.name()} of tensors on two devices")
    held_args, held_kwargs = tree_map_only(There, lambda tensor: tensor.held, (args, kwargs))
    found = function(*held_args, **held_kwargs)
    if not there:
        return found
    result = tree_map_only(Tensor, There, found)
    return return_and_correct_aliasing(function, args, kwargs, result)
