"""Context and data parallelism of a model: frames resharded to places around temporal attention, gradients added.

Letters: n ranks of a context-parallel group, B batch, T frames of the window, t = T / n held here, X places, x = X / n.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from data.layout import Layout
from models.attention.layer import AttentionLayer
from models.attention.multi_head import MultiHeadAttention
from models.composition import build_from_config
from models.resharding import Resharding
from training.ranks import Mesh, Ranks
from training.sharding import is_sharded
from training.sizes import batch_size


class AllToAll(Resharding):
    """One all-to-all each way, packed once, in the dtype that the layer computes in.

    devices: the context-parallel dimension of the mesh. pieces: how many runs of places travel one after another, so
    that one is on its way while the one before is computed. Places are padded to a multiple of the ranks: they do not
    mix, so what the padding computes is thrown away.
    """

    def __init__(self, devices: dist.DeviceMesh, *, pieces: int = 1):
        self.devices, self.ranks, self.pieces = devices, devices.size(), pieces

    def __call__(self, x: Tensor, among_frames: Callable[[Tensor], Tensor]) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        sizes = self._sizes(x.shape[2])
        sent = [self.to_space(part) for part in x.split(sizes, dim=2)]
        back = [self.to_time(among_frames(part), places=size) for part, size in zip(sent, sizes, strict=True)]
        return back[0] if len(back) == 1 else torch.cat(back, dim=2)

    def _sizes(self, places: int) -> list[int]:
        """Places of each piece: whole multiples of the ranks but for the last, so that only it is padded."""
        each = -(-places // (self.pieces * self.ranks)) * self.ranks
        return [min(each, places - start) for start in range(0, places, each)]

    def to_space(self, x: Tensor) -> Tensor:
        """(B, t, X, D) -> (B, T, x, D)"""
        x = F.pad(x, (0, 0, 0, -x.shape[2] % self.ranks))
        sent = rearrange(x, "b t (n x) d -> n b t x d", n=self.ranks)
        return rearrange(self._exchanged(sent), "n b t x d -> b (n t) x d")

    def to_time(self, x: Tensor, *, places: int) -> Tensor:
        """(B, T, x, D) -> (B, t, X, D), X = places"""
        sent = rearrange(x, "b (n t) x d -> n b t x d", n=self.ranks)
        return rearrange(self._exchanged(sent), "n b t x d -> b t (n x) d")[:, :, :places]

    def _exchanged(self, sent: Tensor) -> Tensor:
        """Entry i goes to rank i, entry i of the result comes from it."""
        return collectives.all_to_all_single_autograd(sent.contiguous(), None, None, self.devices.get_group())


class Redistribute(AllToAll):
    """The same through DTensor placements: frames sharded, then places sharded."""

    def to_space(self, x: Tensor) -> Tensor:
        return DTensor.from_local(x, self.devices, [Shard(1)]).redistribute(placements=[Shard(2)]).to_local()

    def to_time(self, x: Tensor, *, places: int) -> Tensor:
        shape = torch.Size((*x.shape[:2], places, x.shape[3]))
        stride = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
        whole = DTensor.from_local(x, self.devices, [Shard(2)], shape=shape, stride=stride)
        return whole.redistribute(placements=[Shard(1)]).to_local()


RESHARDS = {"all_to_all": AllToAll, "dtensor": Redistribute}


def check_mesh(mesh: Mesh, config: DictConfig, layout: Layout) -> None:
    """Raises ValueError, one sentence, where these ranks cannot train the model of a configuration exactly."""
    _check_divides("dp", mesh.dp, "trainer.batch_size", batch_size(config))
    if config.trainer.fsdp and layout.sequences:
        raise ValueError(
            "trainer.fsdp=true shards weights, and a sequence goes on token by token with all of them; "
            "leave trainer.fsdp out, dp works"
        )
    if mesh.dp > 1 and config.model.decoder.get("norm") == "batch":
        raise ValueError(
            f"dp={mesh.dp}: model.decoder.norm=batch reads statistics of a whole batch, of which ranks hold parts; "
            "use model.decoder.norm=group"
        )
    if config.trainer.reshard not in RESHARDS:
        raise ValueError(f"trainer.reshard={config.trainer.reshard} is unknown; use one of {', '.join(RESHARDS)}")
    if mesh.cp == 1:
        return
    for name, module in check_frames(mesh, config, layout).named_modules():
        if drawn := _drawn_by_rank(module):
            raise ValueError(
                f"cp={mesh.cp}: the {drawn} of {name} is not drawn by frame, so ranks would disagree with one rank; "
                f"set {drawn} to 0, or use dp instead of cp"
            )


def check_frames(mesh: Mesh, config: DictConfig, layout: Layout) -> nn.Module:
    """The model, on meta. Raises ValueError, one sentence, where its predictions need the frames of other ranks.

    config: `model` and `task` of it. mesh: with cp above 1.
    """
    if layout.sequences:
        raise ValueError(
            f"cp={mesh.cp} spreads frames over ranks, and a sequence of tokens has none; use dp instead of cp"
        )
    typed = "task.frames" if "frames" in config.task else "task.input_frames"
    _check_divides("cp", mesh.cp, "time_length", layout.frames, hint=f" (time_length is {typed})")
    for target in layout.targets:
        if layout.frames_of(target) is None:
            raise ValueError(
                f"cp={mesh.cp} spreads frames over ranks, and target {target!r} is a forecast, whose decoder reads all "
                "frames; use dp instead of cp"
            )
    with torch.device("meta"):
        model = build_from_config(config, layout)
    for slot, part in (("encoder", model.encoder), ("processor", model.processor)):
        if not getattr(part, "frame_local", False):
            raise ValueError(
                f"cp={mesh.cp} spreads frames over ranks, and model.{slot} ({type(part).__name__}) mixes frames; "
                "use dp instead of cp"
            )
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(f"cp={mesh.cp}: {name} holds statistics of a batch; use dp instead of cp")
    return model


def _drawn_by_rank(module: nn.Module) -> str | None:
    """The option of a layer whose random masks depend on which frames a rank holds. (`VideoDiT` draws by frame.)"""
    if isinstance(module, nn.Dropout) and module.p > 0:
        return "dropout"
    if isinstance(module, AttentionLayer) and module.drop_path > 0:
        return "drop_path"
    if isinstance(module, MultiHeadAttention) and module.dropout > 0:
        return "attention_dropout"
    return None


def _check_divides(name: str, ranks: int, what: str, number: int, *, hint: str = "") -> None:
    if number % ranks:
        allowed = [str(size) for size in range(1, number + 1) if number % size == 0]
        listed = f"{', '.join(allowed[:-1])} or {allowed[-1]}" if len(allowed) > 1 else allowed[0]
        raise ValueError(f"{name} must divide {what}={number}: use {listed}{hint}")


def reshard(model: nn.Module, ranks: Ranks, *, kind: str = "all_to_all", pieces: int = 1) -> None:
    """Makes every layer that mixes frames find those of the other ranks."""
    if ranks.mesh.cp == 1:
        return
    for module in model.modules():
        if isinstance(getattr(module, "resharding", None), Resharding):
            module.resharding = RESHARDS[kind](ranks.devices["cp"], pieces=pieces)


def synchronised(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model whose backward pass averages gradients over all ranks. The model itself stays as it is: a sharded one
    does that already."""
    if ranks.world == 1 or is_sharded(model):
        return model
    device = next(model.parameters()).device
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")  # of small kernels
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # the name that torch 2.11 knows
        # Buffers are tables of constants: there is nothing to send.
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,  # not a second copy of all gradients
        )


@contextmanager
def gathering(network: nn.Module, *, enabled: bool):
    """Whether the backward pass inside exchanges gradients; of accumulated batches only the last one does."""
    if hasattr(network, "set_requires_gradient_sync"):  # sharded
        network.set_requires_gradient_sync(enabled)
    with nullcontext() if enabled or not hasattr(network, "no_sync") else network.no_sync():
        yield
