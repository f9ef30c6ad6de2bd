"""What a model looks like on one batch: parameters of each part, shapes between parts, memory of a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data.batch import Batch
from models.attention import Modulations
from models.latents import Latents

if TYPE_CHECKING:
    from models.encode_process_decode import EncodeProcessDecode

COPIES_IN_TRAINING = 5  # weights, gradients, two moments of Adam, moving average


def describe(model: EncodeProcessDecode, batch: Batch) -> str:
    """One line a part (class, parameters, output) and the memory that training on such batches takes, as text.

    Runs the model forward once, in training mode, with the random state put back; counts the activations that autograd
    really keeps. Raises ValueError where the batch does not suit the model.
    """
    outputs: dict[str, str] = {}
    parts = {"encoder": model.encoder, "processor": model.processor}
    parts |= {"condition": model.condition} if model.condition is not None else {}
    parts |= {"film": model.film} if model.film is not None else {}
    parts |= {f"adapter.{name}": part for name, part in model.adapter.items()}
    parts |= {f"decoder.{name}": part for name, part in model.decoder.items()}
    hooks = [
        part.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: _shape(output)}))
        for name, part in parts.items()
    ]
    kept = KeptTensors(model)
    training = model.training
    device = batch.base_time.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.train()
            with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
                model(batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    lines = [("input " + name, "", "", f"{_dimensions(field.values)}") for name, field in batch.inputs.items()]
    lines += [
        (name, type(part).__name__, f"{_count(part):,}", outputs[name]) for name, part in _ordered(parts, outputs)
    ]
    lines.append(("total", "", f"{_count(model):,}", ""))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    table = [
        f"{part:<{widths[0]}}  {kind:<{widths[1]}}  {count:>{widths[2]}}  {shape}".rstrip()
        for part, kind, count, shape in lines
    ]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    total = COPIES_IN_TRAINING * weights + kept.bytes
    memory = (
        f"training memory about {_size(total)} for a batch of {batch.batch_size}: weights, gradients and optimiser "
        f"{_size(COPIES_IN_TRAINING * weights)}, activations {_size(kept.bytes)}"
    )
    return "\n".join([*table, memory])


def outline(model: EncodeProcessDecode) -> str:
    """One line a part (class, parameters), without running anything."""
    parts = {"film": model.film, "encoder": model.encoder, "processor": model.processor, "condition": model.condition}
    parts |= {f"adapter.{name}": part for name, part in model.adapter.items()}
    parts |= {f"decoder.{name}": part for name, part in model.decoder.items()}
    parts = {name: part for name, part in parts.items() if part is not None and _count(part)}
    lines = [(name, type(part).__name__, f"{_count(part):,}") for name, part in parts.items()]
    lines.append(("total", "", f"{_count(model):,}"))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in lines)


class KeptTensors:
    """Counts the storages that autograd saves for backward, each once, without those of the parameters."""

    def __init__(self, model: nn.Module):
        self.seen = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        self.storages: list[torch.UntypedStorage] = []  # held, so that no address is used twice
        self.bytes = 0

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.storages.append(storage)
            self.bytes += storage.nbytes()
        return tensor


def _ordered(parts: dict[str, nn.Module], outputs: dict[str, str]) -> list[tuple[str, nn.Module]]:
    """Parts in the order in which they ran."""
    return [(name, parts[name]) for name in outputs]


def _shape(output: Latents | Modulations | Tensor | None) -> str:
    if output is None:
        return ""
    if isinstance(output, Modulations):
        return f"{len(output.of_layers)} layers modulated by the lead time"
    if not isinstance(output, Latents) and output.ndim == 2:
        return f"{_dimensions(output)} (batch, condition)"
    if isinstance(output, Latents):
        return f"{_dimensions(output.tokens)} latents (batch, frames, tokens, hidden)"
    return f"{_dimensions(output)} (batch, lead times, outputs, places)"


def _dimensions(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _count(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"
