"""The optimiser and its schedule: which parameters decay, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

OPTIMIZERS = ("adamw", "sgd")
SCHEDULERS = ("cosine", "constant")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weight matrices and kernels decay; norms, biases, embeddings and other parameters do not."""
    decayed, spared, seen = [], [], set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_matrix = name.endswith("weight") and parameter.ndim >= 2
            # Positions, latents and other learned inputs are embeddings too; their names do not end in weight.
            spare = not is_matrix or isinstance(module, nn.Embedding | nn.EmbeddingBag)
            (spared if spare else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, *, name: str, lr: float, weight_decay: float, betas, eps: float):
    """AdamW, or SGD with Nesterov momentum `betas[0]`. Raises ValueError for another name."""
    groups = parameter_groups(model, weight_decay)
    if not groups:
        raise ValueError("the model has no trainable parameters; choose another encoder, processor or decoder")
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=betas[0], nesterov=betas[0] > 0)
    raise ValueError(f"optimizer.name={name!r} is unknown; use optimizer.name={'|'.join(OPTIMIZERS)}")


def learning_rate(
    step: int, *, max_steps: int, lr: float, name: str, warmup_steps: int, final_lr_fraction: float
) -> float:
    """Rate of update number `step` (0-based): linear warm-up, then a cosine to `final_lr_fraction * lr`, or constant.

    A budget shorter than ten times the warm-up warms up over a tenth of it. Raises ValueError for another name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler.name={name!r} is unknown; use scheduler.name={'|'.join(SCHEDULERS)}")
    warmup = min(warmup_steps, max_steps // 10)
    if step < warmup:
        return lr * (step + 1) / warmup
    if name == "constant":
        return lr
    progress = min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup))
    return lr * (final_lr_fraction + (1 - final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
