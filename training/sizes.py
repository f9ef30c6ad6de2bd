"""Does the model fit? `model/size=auto` becomes the largest size that does; a forced one that does not is refused."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from data.layout import Layout
from models.composition import with_size
from models.memory import available_bytes, training_bytes
from training.cluster import ranks_here
from training.devices import choose_device, choose_precision
from training.ranks import Mesh

DEFAULT_BATCH_SIZE = 8
SIZES = ("tiny", "small", "base", "production")  # conf/model/size, ascending


class TooLarge(ValueError):
    """A forced size, or the smallest one, does not fit."""


def fitted(config: DictConfig, layout: Layout, mesh: Mesh, *, automatic: bool) -> DictConfig:
    """The configuration at a size whose training fits the memory of a rank.

    config: at the size that was asked for or, automatic, that the data recommends: the largest that is tried. mesh: the
    ranks that share the work. Says in a line what was chosen. Raises TooLarge where a forced size, or even the smallest
    one, does not fit.
    """
    device = choose_device(config.trainer.device)
    available = available_bytes(device, ranks=ranks_here(mesh.world))
    wanted = config.model.size
    while (needed := _needed(config, layout, mesh)) > available:
        smaller = SIZES.index(config.model.size) - 1 if config.model.size in SIZES else -1
        if not automatic or smaller < 0:
            raise TooLarge(
                f"model/size={config.model.size} needs about {_gib(needed)} to train with "
                f"trainer.batch_size={batch_size(config)}, and {_share(device, mesh)} has {_gib(available)}; "
                f"use {_advice(config, mesh, smaller)}"
            )
        config = with_size(SIZES[smaller])
    if automatic:
        size = config.model.size
        why = "what the data recommends" if size == wanted else f"the largest that fits {_gib(available)}"
        other = next(name for name in ("small", "tiny") if name != size)
        print(f"model/size={size}: {why}, about {_gib(needed)}; model/size={other} forces another")
    return config


def batch_size(config: DictConfig) -> int:
    """What was typed, else what the data recommends."""
    if config.trainer.batch_size is not None:
        return config.trainer.batch_size
    return (config.data.get("recommended") or {}).get("batch_size", DEFAULT_BATCH_SIZE)


def _needed(config: DictConfig, layout: Layout, mesh: Mesh) -> int:
    precision = choose_precision(config.trainer.precision, choose_device(config.trainer.device))
    return training_bytes(
        config,
        layout,
        batch_size=max(1, batch_size(config) // mesh.dp),
        frame_parts=mesh.cp,
        weight_parts=mesh.world if config.trainer.fsdp else 1,
        sixteen_bit=precision in ("bf16", "fp16"),
    )


def _share(device: torch.device, mesh: Mesh) -> str:
    return f"this {device.type} device" if mesh.world == 1 else f"each of {mesh.world} ranks on {device.type}"


def _advice(config: DictConfig, mesh: Mesh, smaller: int) -> str:
    advice = [f"model/size={SIZES[smaller]}"] if smaller >= 0 else []
    advice += ["trainer.batch_size=1"] if batch_size(config) > 1 else []
    if config.model.processor.get("checkpoint") == "none":
        advice.append("model.processor.checkpoint=all")
    if mesh.world > 1 and not config.trainer.fsdp:
        advice.append("trainer.fsdp=true")
    return " or ".join(advice) or "a machine with more memory"


def _gib(number: int) -> str:
    return f"{number / 2**30:.2g} GiB" if number < 2**30 * 99 else f"{number / 2**30:.0f} GiB"
