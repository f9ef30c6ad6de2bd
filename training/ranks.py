"""The ranks of a run: processes that train one model together, each on some samples and some frames of them.

dp ranks read different samples (data parallel), cp ranks different frames of the same samples (context parallel). Rank
r = (sample part) * cp + (frame part). Everything here is the identity where a run has one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=30)  # for what one rank does alone: statistics, baselines, scores


@dataclass(frozen=True)
class Mesh:
    """dp x cp ranks."""

    dp: int = 1
    cp: int = 1

    @property
    def world(self) -> int:
        return self.dp * self.cp

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in (("dp", self.dp), ("cp", self.cp)) if size > 1)


class Ranks:
    """This process among the ranks of a run.

    mesh: how many there are. rank: which of them this is. With more than one, the process group exists already
    (`training/launch.py`). patient: a group whose members wait for what one of them does alone.
    """

    def __init__(self, mesh: Mesh | None = None, rank: int = 0):
        self.mesh = Mesh() if mesh is None else mesh
        self.rank, self.world = rank, self.mesh.world
        self.sample_part, self.frame_part = divmod(rank, self.mesh.cp)
        self.is_first = rank == 0
        self.devices = self.patient = None
        if self.world > 1:
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
            kind = "cuda" if torch.cuda.is_available() and dist.get_backend_config().find("nccl") >= 0 else "cpu"
            shape = (self.mesh.dp, self.mesh.cp)
            self.devices = dist.device_mesh.init_device_mesh(kind, shape, mesh_dim_names=("dp", "cp"))

    def frames(self, total: int) -> tuple[int, int]:
        """(first, count): the frames that this rank holds of a window of `total`."""
        assert total % self.mesh.cp == 0, "refused before processes start"
        count = total // self.mesh.cp
        return self.frame_part * count, count

    def sum(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor added over all ranks, in one message; the same on every rank, without gradients."""
        if self.world == 1:
            return dict(tensors)
        joined = torch.cat([tensor.detach().flatten() for tensor in tensors.values()])
        dist.all_reduce(joined)
        parts = joined.split([tensor.numel() for tensor in tensors.values()])
        return {name: part.view_as(tensor) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What the first rank makes, however long it takes, on every rank; it is pickled on the way."""
        box = [make() if self.is_first else None]
        if self.world > 1:
            dist.broadcast_object_list(box, group=self.patient)
        return box[0]

    def wait_for_all(self) -> None:
        if self.world > 1:
            dist.barrier()


def join(rank: int, world: int, *, method: str, device: str, timeout: float) -> None:
    """Makes this process a rank: gloo for tensors on the CPU, NCCL for those on GPUs. method: see torch.distributed."""
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, init_method=method, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
