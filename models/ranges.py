"""Ranges of numbers in a configuration: one table for the options of parts, one for the trunk, by name.

Here is what no part checks itself, because the value is only multiplied or handed to torch, whose error names neither
the option nor what to type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

# (lowest, highest, whether the highest is allowed, in words)
_Range = tuple[float, float, bool, str]
COUNT: _Range = (1, math.inf, False, "at least 1")
NATURAL: _Range = (0, math.inf, False, "0 or more")
POSITIVE: _Range = (math.ulp(0.0), math.inf, False, "above 0")
CHANCE: _Range = (0, 1, False, "at least 0 and below 1")
SHARE: _Range = (0, 1, True, "between 0 and 1")

_counts = (
    "hidden_size num_heads num_latents num_blocks num_bands cross_heads qk_width v_width cross_qk_width cross_v_width"
)
PARTS: dict[str, _Range] = {
    **dict.fromkeys(_counts.split(), COUNT),
    **dict.fromkeys(("depth", "self_per_cross", "annual_harmonics", "diurnal_harmonics", "rotary_layers"), NATURAL),
    **dict.fromkeys(("mlp_ratio", "cross_mlp_ratio"), POSITIVE),
    "prefix_dropout": SHARE,
    **dict.fromkeys(("dropout", "attention_dropout", "drop_path"), CHANCE),
}
TRUNK: dict[str, _Range] = {
    "seed": NATURAL,
    "optimizer.lr": POSITIVE,
    "optimizer.weight_decay": NATURAL,
    "optimizer.eps": NATURAL,
    "optimizer.betas": CHANCE,
    "scheduler.warmup_steps": NATURAL,
    "scheduler.final_lr_fraction": SHARE,
    "trainer.clip_norm": POSITIVE,
    "trainer.validation_batches": COUNT,
    "trainer.overfit_batches": NATURAL,
    "trainer.reshard_pieces": COUNT,
    "data.recommended.max_steps": COUNT,
}


def check_options(path: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError, one sentence, for the first option of a part (at `path`) outside its range."""
    for key, value in options.items():
        if key in PARTS:
            for number in value if isinstance(value, list) else [value]:  # one a block
                _check(f"{path}.{key}", number, PARTS[key])


def check_trunk(config: DictConfig) -> None:
    """Raises ValueError, one sentence, for the first number outside its range."""
    for key, allowed in TRUNK.items():
        value = OmegaConf.select(config, key)
        if key == "optimizer.betas" and len(value) != 2:
            raise ValueError(f"{key}={list(value)} must be two numbers, like 'optimizer.betas=[0.9,0.95]'")
        for number in value if OmegaConf.is_list(value) else [value]:
            _check(key, number, allowed)


def _check(name: str, value: Any, allowed: _Range) -> None:
    if value is None:
        return
    low, high, closed, words = allowed
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (low <= value < high or (closed and value == high)):
        raise ValueError(f"{name}={value} must be {words}; type {name}=<a number {words}>")
