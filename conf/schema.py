"""Typed schema of the configuration's trunk. Parts with a `_target_` (model slots, data, task) are checked against
their constructors' signatures instead (`models/checks.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore


@dataclass
class Optimizer:
    name: str = "adamw"
    lr: Optional[float] = None  # None: what the data recommends, else 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


@dataclass
class Scheduler:
    name: str = "cosine"
    warmup_steps: int = 100
    final_lr_fraction: float = 0.01


@dataclass
class Trainer:
    max_steps: Optional[int] = None  # None: what the data recommends
    batch_size: Optional[int] = None  # None: what the data recommends, else 8
    accumulate: int = 1
    clip_norm: Optional[float] = 1.0
    ema_decay: Optional[float] = 0.999
    precision: str = "float32"
    compile: bool = False
    device: str = "auto"
    num_threads: Optional[int] = None
    autotune: bool = True
    validate_every: Optional[int] = None  # None: ten times over the budget
    validation_batches: Optional[int] = None  # None: the whole validation split
    checkpoint_every: Optional[int] = None  # None: whenever validated
    keep: int = 1
    early_stopping: Optional[int] = None  # validations without improvement before stopping
    overfit_batches: int = 0
    reshard: str = "all_to_all"
    reshard_pieces: int = 1
    fsdp: bool = False
    async_checkpoint: bool = False
    timeout: float = 600.0
    profile: bool = False
    progress: bool = True


@dataclass
class Tracking:
    enabled: bool = True
    uri: Optional[str] = None  # None: sqlite:///<repository>/mlflow.db
    experiment: str = "hydrasphere"
    run_name: Optional[str] = None
    flush_every: int = 50
    system_metrics: bool = False


@dataclass
class Train:
    seed: int = 0
    cp: Optional[int] = None
    dp: Optional[int] = None
    dry_run: bool = False
    report: bool = True
    resume: Optional[str] = None
    task: Any = None
    data: Any = None
    model: Any = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    scheduler: Scheduler = field(default_factory=Scheduler)
    trainer: Trainer = field(default_factory=Trainer)
    tracking: Tracking = field(default_factory=Tracking)


@dataclass
class Evaluate:
    run: Optional[str] = None
    compare: Any = None
    checkpoint: str = "best"
    split: str = "test"
    weights: str = "area"
    baselines: Optional[list[str]] = None  # None: all of the task
    regions: Any = None
    max_windows: Optional[int] = None
    report: bool = True
    predictions: bool = True
    device: str = "auto"
    num_threads: Optional[int] = None
    autotune: bool = True
    output: Optional[str] = None
    log: bool = True
    uri: Optional[str] = None
    cp: Optional[int] = None
    timeout: float = 600.0


def register() -> None:
    """Makes the schema known to Hydra's configuration store (idempotent)."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=Train)
    store.store(name="evaluate_schema", node=Evaluate)
