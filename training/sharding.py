"""Weights, gradients, optimiser state and average sharded over all ranks (FSDP2), and their shards in checkpoints.

Every rank holds its share of each tensor, and whole weights exist only while a unit computes: a block of the processor,
or everything else. Gradients come out as the average over ranks, as those of DistributedDataParallel do.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from models.stored_weights import SHARDS, read_shards, shard_shapes, share
from training.ranks import Mesh, Ranks

OPTIMIZER = "optimizer"  # prefix of its tensors in shards: optimizer.<number of the parameter>.<name>


def check_sharding(mesh: Mesh, trainer) -> None:
    """Raises ValueError where a run of one rank is asked to shard its weights: it would do nothing."""
    if trainer.fsdp and mesh.world == 1:
        raise ValueError(
            "trainer.fsdp=true shards weights over ranks, and this run has one; add +dp=2 or +cp=2, or use "
            "trainer.fsdp=false"
        )


def shard(model: nn.Module, ranks: Ranks, *, precision: str) -> None:
    """Shards a model, on whatever device, onto the devices of the ranks. With bf16, whole weights are bf16, those that
    are kept and updated float32, and gradients are added up in float32; the model then computes under autocast wherever
    it is called, with a float32 residual stream."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nobody writes into it
    everyone = dist.device_mesh.init_device_mesh(ranks.devices.device_type, (ranks.world,), mesh_dim_names=("ranks",))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        model.forward = torch.autocast(ranks.devices.device_type, torch.bfloat16)(model.forward)
    for unit in (*units(model), model):
        # The last one, too: weights that stay whole after a validation would be missed by the optimiser.
        fully_shard(unit, mesh=everyone, mp_policy=policy, reshard_after_forward=True)


def units(model: nn.Module) -> list[nn.Module]:
    """What becomes whole one after another: the blocks of the processor."""
    lists = [part for part in getattr(model, "processor", nn.Module()).children() if isinstance(part, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scales gradients so that the norm of all of them on all ranks is at most `limit`; returns what it was."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def without_tensors(state: dict) -> tuple[dict, dict[str, Tensor]]:
    """State of an optimiser of sharded parameters as (plain numbers, sharded tensors by their names in shards)."""
    numbers, tensors = {}, {}
    for index, entries in state["state"].items():
        numbers[index] = {key: value for key, value in entries.items() if not isinstance(value, DTensor)}
        sharded = {key: value for key, value in entries.items() if isinstance(value, DTensor)}
        tensors |= {f"{OPTIMIZER}.{index}.{key}": value for key, value in sharded.items()}
    return dict(state, state=numbers), tensors


def with_tensors(state: dict, folder: Path, optimizer: torch.optim.Optimizer) -> dict:
    """State of an optimiser from a checkpoint folder, whole or in shards, each tensor held as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held: dict[int, dict] = {}
    for index, entries in state["state"].items():
        held[index] = {key: share(value, parameters[index]) for key, value in entries.items()}
    if (folder / SHARDS).is_dir():
        names = [name for name in shard_shapes(folder) if name.split(".")[0] == OPTIMIZER]
        places = {name: name.split(".")[1:] for name in names}
        tensors = {name: torch.empty_like(parameters[int(index)].detach()) for name, (index, _) in places.items()}
        if tensors:
            read_shards(folder, tensors)
        for name, (index, key) in places.items():
            held.setdefault(int(index), {})[key] = tensors[name]
    return dict(state, state=held)


class ShardWriter:
    """Writes tensors of all ranks as one safetensors file a rank. Every rank calls the same methods.

    Its messages have a group of their own, so that they may travel while the ranks train.
    """

    def __init__(self, *, timeout: float):
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def wait_for_all(self) -> None:
        dist.barrier(self.group)

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Returns when all ranks have written. Raises OSError on all of them where one could not."""
        writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            checkpoint.save(dict(tensors), storage_writer=writer, process_group=self.group)
        except checkpoint.CheckpointException as error:
            rank, (first, _) = next(iter(error.failures.items()))
            if isinstance(first, OSError):
                raise OSError(first.errno, f"{first.strerror or first} on rank {rank}") from error
            raise first from error


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which training does not change."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    return stager.stage(dict(tensors))
