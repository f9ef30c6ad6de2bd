"""Weights and description of a checkpoint: a folder with whole weights, or with shards that the ranks of a run wrote,
or one file made of either by `training/export.py`.

`<name>.safetensors` holds whole tensors under the names of the model. `shards/*.safetensors` hold pieces of tensors
with their places, under `<name>.<name in the model>`, and torch.distributed.checkpoint puts together what is asked for,
on any number of ranks. The model may itself be sharded. An exported file holds the weights under the names of the model
and the description in its header. All kinds are safetensors and JSON: reading runs no code.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

SHARDS = "shards"
HEADER = "checkpoint"  # key of the description in an exported file's header


def description(checkpoint: Path) -> dict:
    """What `config.json` of a checkpoint says. Raises ValueError where this is no checkpoint."""
    from safetensors import SafetensorError, safe_open

    place = checkpoint / "config.json"
    try:
        if not checkpoint.is_file():
            return json.loads(place.read_text())
        place = checkpoint
        with safe_open(checkpoint, framework="pt") as file:
            return json.loads(file.metadata()[HEADER])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{checkpoint} is not a checkpoint (no config.json); give a folder such as <run>/checkpoints/best"
        ) from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{place} does not say of what model; give a file of python -m training.export") from error
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{place} is damaged ({error}); use another checkpoint of the run") from error


def fill(model: nn.Module, checkpoint: Path, name: str) -> None:
    """Reads weights `name` (model, ema) of a checkpoint into the model; an exported file holds one kind.

    Raises FileNotFoundError, safetensors' SafetensorError, or RuntimeError where names or shapes differ or pieces are
    missing.
    """
    from safetensors.torch import load

    own = model.state_dict()
    if (checkpoint / SHARDS).is_dir():
        read_shards(checkpoint, {f"{name}.{key}": tensor for key, tensor in own.items()})
        return
    whole = load((checkpoint if checkpoint.is_file() else checkpoint / f"{name}.safetensors").read_bytes())
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


def count_weights(checkpoint: Path) -> int:
    """How many numbers the weights in a checkpoint folder are, from the headers of its files; 0: there are none."""
    from safetensors import safe_open

    if (checkpoint / SHARDS).is_dir():
        return sum(shape.numel() for name, shape in shard_shapes(checkpoint).items() if name.startswith("model."))
    if not (checkpoint / "model.safetensors").is_file():
        return 0
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


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
