"""Bytes that collectives send, counted where they are called.

A dispatch mode sees every collective of a thread: those that autograd runs in the backward pass on the CPU, and those
of DistributedDataParallel, too. n ranks.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Bytes that a rank sends to others, of a collective whose input on this rank has `size` bytes.
SENT = {
    "all_to_all_single": lambda size, n: size * (n - 1) // n,
    "alltoall_base_": lambda size, n: size * (n - 1) // n,
    "all_gather_into_tensor": lambda size, n: size * (n - 1),
    "_allgather_base_": lambda size, n: size * (n - 1),
    "reduce_scatter_tensor": lambda size, n: size * (n - 1) // n,
    "_reduce_scatter_base_": lambda size, n: size * (n - 1) // n,
    "all_reduce": lambda size, n: 2 * size * (n - 1) // n,  # a ring: reduce-scatter, then all-gather
    "allreduce_": lambda size, n: 2 * size * (n - 1) // n,
}
OUTPUT_FIRST = ("alltoall_base_", "_allgather_base_", "_reduce_scatter_base_")
SILENT = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "broadcast_")  # set-up and bookkeeping


class SentBytes(TorchDispatchMode):
    """Within it, `sent` counts bytes by the name of the collective; group: of how many ranks they are.

    Raises NotImplementedError for a collective that it cannot count, so that none is overlooked.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        super().__init__()
        self.ranks = dist.get_world_size(group)
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self._count(function._schema.name.split("::")[1], args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name in SILENT:
            return
        if name not in SENT:
            raise NotImplementedError(f"benchmarks/collectives.py does not know what {name} sends")
        given = args[1] if name in OUTPUT_FIRST else args[0]
        tensors = [given] if isinstance(given, Tensor) else list(given)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.sent[name] += SENT[name](size, self.ranks)


def total(sent: Counter[str], *, reduced: bool) -> int:
    """Bytes of gradients and sums (reduced) or of everything else."""
    return sum(size for name, size in sent.items() if ("reduce" in name) == reduced)


def most(seconds: float) -> float:
    """The largest value of all ranks."""
    if not dist.is_initialized():
        return seconds
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()
