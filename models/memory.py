"""How much memory training a model takes, found on the meta device: nothing is allocated, nothing computed.

Weights, gradients, optimiser state and average count exactly; activations are those that autograd would keep in one
forward pass. Observations, whose number a layout does not know, count with what each cell's queries keep.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from data.batch import Batch, Steps
from data.field import Field, Reference
from data.layout import Layout
from data.sequence import Sequence
from models.attention.pixel import PixelCrossAttention
from models.composition import build_from_config
from models.summary import COPIES_IN_TRAINING, KeptTensors

SIXTEEN_BIT = 0.6  # of the activations in float32: norms and residuals stay wide
OVERHEAD = 1.15  # work space of products and the allocator's slack


def training_bytes(
    config: DictConfig,
    layout: Layout,
    *,
    batch_size: int,
    sixteen_bit: bool,
    frame_parts: int = 1,
    weight_parts: int = 1,
) -> int:
    """Bytes that one rank needs to train the model of a configuration on batches of this layout.

    frame_parts: how many ranks share the frames of a sample, which tokens, and so activations, belong to.
    weight_parts: how many share weights, gradients, optimiser state and average.
    """
    config = copy.deepcopy(config)
    # What the kernels of a device keep; on the meta device they would fall back to the whole matrix of logits.
    config.model.attention = "blockwise"
    gridded = _without_observations(layout)
    with torch.device("meta"):
        model = build_from_config(config, layout)
        plain = model if gridded == layout else build_from_config(config, gridded)
    weights = _size(model)
    if recomputed := getattr(model.processor, "recomputed", ()):  # one block at a time is computed again
        model.processor.recomputed = plain.processor.recomputed = recomputed[1:]
    activations = _activations(plain, gridded, batch_size, places=config.task.get("query_fraction", 1.0))
    activations += _queries_bytes(model, batch_size)
    activations /= frame_parts
    kept = COPIES_IN_TRAINING * weights / weight_parts
    if weight_parts > 1:
        kept += _whole_bytes(model, sixteen_bit)
        kept += weights if config.trainer.accumulate > 1 else 0  # gradients stay whole until the last batch
    return round(OVERHEAD * (kept + activations * (SIXTEEN_BIT if sixteen_bit else 1.0)))


def _whole_bytes(model: nn.Module, sixteen_bit: bool) -> float:
    """Of sharded weights and gradients, what is whole at a time: everything outside the processor's blocks, and two
    blocks, since the next one is fetched while one computes."""
    blocks = [
        size for part in model.processor.children() if isinstance(part, nn.ModuleList) for size in map(_size, part)
    ]
    whole = _size(model) - sum(blocks) + 2 * max(blocks, default=0)
    return 2 * whole * (0.5 if sixteen_bit else 1.0)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _activations(model: nn.Module, layout: Layout, batch_size: int, *, places: float) -> float:
    """Bytes that autograd keeps for one backward pass, in float32. places: share of those that a training step decodes
    where a decoder can leave the others out; what it keeps of the latents, far less, is taken to shrink with them."""
    kept, decoding = KeptTensors(model.to("meta").train()), {}
    for decoder in (part for part in model.decoder.values() if hasattr(part, "draw_places")):
        decoder.register_forward_pre_hook(lambda part, _: decoding.update({part: kept.bytes}))
        decoder.register_forward_hook(lambda part, *_: decoding.update({part: kept.bytes - decoding[part]}))
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        model(_meta_batch(layout, batch_size))
    return kept.bytes - (1 - places) * sum(decoding.values())


def available_bytes(device: torch.device, *, ranks: int = 1) -> int:
    """Memory of the device; of the machine, shared by its ranks, where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    ]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(name).read_text().strip() if Path(name).is_file() else "max"
        limits += [int(text)] if text.isdigit() else []
    return min(limits) // ranks


def _without_observations(layout: Layout) -> Layout:
    """The same frames, read from the gridded inputs alone."""
    if layout.sequences:
        return layout
    inputs = {name: replace(item, frames=layout.frames) for name, item in layout.inputs.items()}
    if layout.observations is not None:
        inputs = {name: replace(item, step=layout.observations.step) for name, item in inputs.items()}
        return replace(layout, inputs=inputs, observations=None)
    return layout


def _meta_batch(layout: Layout, batch_size: int) -> Batch:
    def field(item, times: int) -> Field:
        moments = torch.zeros(batch_size, times, device="meta")
        values = torch.zeros(batch_size, times, len(item.variables), *item.grid.shape, device="meta")
        return Field(
            values,
            item.variables,
            item.grid,
            moments.long(),
            reference=Reference(values, values),
            second_of_day=moments,
            day_of_year=moments,
        )

    if layout.sequences:
        return _meta_sequences(layout, batch_size)
    inputs = {name: field(item, item.frames) for name, item in layout.inputs.items()}
    targets = {name: field(item, len(item.lead_times)) for name, item in layout.targets.items()}
    return Batch(inputs, targets, layout, steps=_meta_steps(layout, batch_size))


def _meta_steps(layout: Layout, batch_size: int) -> Steps | None:
    """Of a rollout to the last lead time."""
    for item in layout.targets.values():
        if item.feeds:
            moments = torch.zeros(batch_size, max(item.lead_times) // layout.inputs[item.feeds].step, device="meta")
            scale = torch.zeros(len(item.variables), *[1] * len(item.grid.shape), device="meta")
            return Steps(scale, scale, moments.long(), moments, moments)
    return None


def _meta_sequences(layout: Layout, batch_size: int) -> Batch:
    """The longest sequences, whose last tokens predict what the target describes."""

    def sequence(length: int, prefix_len: int = 0) -> Sequence:
        return Sequence(torch.zeros(batch_size, length, dtype=torch.int64, device="meta"), prefix_len=prefix_len)

    targets = {name: sequence(item.length) for name, item in layout.targets.items()}
    latents = min(item.length for item in layout.targets.values())
    inputs = {name: sequence(item.length, item.length - latents) for name, item in layout.inputs.items()}
    return Batch(inputs, targets, layout)


def _queries_bytes(model: nn.Module, batch_size: int) -> int:
    """What the attention to observations keeps: normed tokens, queries and mixtures of every cell, in float32."""
    latents = model.encoder.latent_layout
    cells = batch_size * latents.frames * latents.num_tokens
    blocks = getattr(model.processor, "blocks", [])
    again = {
        module for index in getattr(model.processor, "recomputed", ()) for module in blocks[index].modules()
    }  # computed again in the backward pass: nothing is kept
    layers = [module for module in model.modules() if isinstance(module, PixelCrossAttention) and module not in again]
    return sum(4 * cells * (layer.query.in_features + 2 * layer.output.in_features) for layer in layers)
