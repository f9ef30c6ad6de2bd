"""Weights of a checkpoint folder, read into a model: from one file, or from shards that the ranks of a run wrote.

`<name>.safetensors` holds whole tensors under the names of the model. `shards/*.safetensors` hold pieces of tensors
with their places, under `<name>.<name in the model>`, and torch.distributed.checkpoint puts together what is asked for,
on any number of ranks. The model may itself be sharded. Both kinds are safetensors and JSON: reading runs no code.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

SHARDS = "shards"


def fill(model: nn.Module, checkpoint: Path, name: str) -> None:
    """Reads weights `name` (model, ema) of a checkpoint folder into the model.

    Raises FileNotFoundError, safetensors' SafetensorError, or RuntimeError where names or shapes differ or pieces are
    missing.
    """
    from safetensors.torch import load

    own = model.state_dict()
    if (checkpoint / SHARDS).is_dir():
        read_shards(checkpoint, {f"{name}.{key}": tensor for key, tensor in own.items()})
        return
    whole = load((checkpoint / f"{name}.safetensors").read_bytes())
    model.load_state_dict({key: share(tensor, own.get(key)) for key, tensor in whole.items()})


def share(whole: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor as `like` is held: where that is sharded along its first dimension, this rank's piece of it."""
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    pieces, rank = whole.chunk(like.device_mesh.size()), like.device_mesh.get_local_rank()
    piece = pieces[rank] if rank < len(pieces) else whole[:0]
    return DTensor.from_local(
        piece.to(like.device, like.dtype, copy=True),
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=like.stride(),
    )


def shard_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Names and shapes of the whole tensors in the shards of a checkpoint. Raises RuntimeError where a piece is
    missing."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    folder = checkpoint / SHARDS
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, item in stored.items():
        if sum(chunk.sizes.numel() for chunk in item.chunks) != item.size.numel():
            raise RuntimeError(f"a piece of {name} is missing in {folder.name}")
    return {name: item.size for name, item in stored.items()}


def read_shards(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors, whole or sharded, in place. The names must be all that the shards hold under their prefixes."""
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    prefixes = {name.split(".")[0] for name in tensors}
    stored = {name: shape for name, shape in shard_shapes(checkpoint).items() if name.split(".")[0] in prefixes}
    if stored.keys() != tensors.keys():
        raise RuntimeError(f"{min(stored.keys() ^ tensors.keys())} is in one of checkpoint and model only")
    for name, tensor in tensors.items():
        if stored[name] != tensor.shape:
            raise RuntimeError(f"{name} has shape {tuple(stored[name])}, and the model's has {tuple(tensor.shape)}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each rank reads its own
            load(
                {name: tensor.detach() for name, tensor in tensors.items()},
                storage_reader=HuggingFaceStorageReader(str(checkpoint / SHARDS)),
                no_dist=True,
            )
    except CheckpointException as error:  # no Exception: it would pass every handler
        first = next(iter(error.failures.values()))[0]
        raise first if isinstance(first, Exception) else RuntimeError(str(error)) from error
