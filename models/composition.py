"""From a configuration to a model: `build`, `load`, `compose`. The only file of `models` that knows Hydra.

from models import build, load
model = build(["model=perceiver_io", "model/encoder=perceiver"])       # as on the command line
model = load("outputs/2026-01-31/12-00-00/checkpoints/best")
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from data.layout import Layout
from models.adapters import GridAdapter
from models.checks import check_config, part_class, part_options
from models.conditioning.lead_time import LeadTimeFiLM
from models.encode_process_decode import EncodeProcessDecode
from models.heads import TokenHead, build_head
from models.latents import LatentLayout
from models.patches import patches_of
from models.refusals import adapter_grid, refuse
from models.rollout import Rollout
from models.stored_weights import description, fill

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "conf"
FORMAT = 1


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The complete, checked training configuration that `python train.py <overrides>` would run with.

    Works inside a running Hydra application: its global state is put back. Raises ValueError, one sentence, where the
    configuration makes no sense; Hydra's own errors for overrides that do not parse.
    """
    return check(_composed(overrides), overrides)


def check(config: DictConfig, overrides: Sequence[str] | None = None) -> DictConfig:
    """The configuration after every check that needs no data; `model/size=auto` becomes what the data recommends.

    overrides: what it was composed with; None: those of the running Hydra job. Raises ValueError, one sentence.
    """
    check_config(config, HydraConfig.get().overrides.task if overrides is None else overrides)
    if config.model.get("size") != "auto":
        return config
    recommended = config.data.get("recommended") or {}
    return with_size(recommended.get("size") or "small", overrides)


def with_size(size: str, overrides: Sequence[str] | None = None, searched: Sequence[str] = ()) -> DictConfig:
    """The configuration of some overrides at a named size; explicit settings of what a size sets beat it.

    overrides, searched: what was typed and folders with more options; None: those of the running Hydra job.
    """
    if overrides is None:
        job = HydraConfig.get()
        overrides = job.overrides.task
        searched = [source.path for source in job.runtime.config_sources if source.schema == "file"]
    kept = [override for override in overrides if override.split("=")[0].lstrip("+") != "model/size"]
    return _composed([*kept, f"model/size={size}"], searched)


def build(overrides: Sequence[str] = (), layout: Layout | None = None) -> EncodeProcessDecode:
    """The model of a configuration, with random weights. layout: None reads it from the configuration's data."""
    config = compose(overrides)
    if layout is None:
        data, task = (instantiate(node, _convert_="all") for node in (config.data, config.task))
        layout = task.layout(data)
    return build_from_config(config, layout)


def build_from_config(config: DictConfig | Mapping, layout: Layout) -> EncodeProcessDecode:
    """The model of a composed configuration (`model` and `task` of it) for a layout.

    Raises ValueError where parts and layout make no sense together, naming the override to use instead.
    """
    config = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    model = OmegaConf.to_container(config.model, resolve=True, throw_on_missing=True)
    head = build_head(config.task.head, loss=config.task.loss, bins=config.task.get("bins"))
    refuse(model, layout)
    if isinstance(head, TokenHead) != bool(layout.sequences):
        kind = "tokens" if layout.sequences else "fields"
        raise ValueError(f"task.head={config.task.head} does not predict {kind}; leave task.head out")
    encoder = _encoder(model, layout)
    embedder = model.get("condition")
    condition = part_class(embedder)(**part_options(embedder)) if isinstance(embedder, Mapping) else None
    adapters = nn.ModuleDict()

    def gridded(place: str, latents: LatentLayout, target: str | None = None) -> LatentLayout:
        grid = adapter_grid(part_class(model[place]), part_options(model[place]), latents, layout, target)
        if grid is None:
            return latents
        adapters[target or place] = adapter = GridAdapter(
            latents,
            patches_of(grid, model["patch_size"]),
            num_heads=model["num_heads"],
            each=place == "processor",
            attention=model["attention"],
        )
        return adapter.latent_layout

    latents = replace(encoder.latent_layout, condition_size=condition.size if condition is not None else 0)
    latents = gridded("processor", latents)
    processor = _part(model, "processor", layout, latents)
    decoders, frames = nn.ModuleDict(), {}
    writes_tokens = getattr(part_class(model["decoder"]), "writes_tokens", False)
    for target in layout.targets:
        matching = layout.frames_of(target, latents.frames)
        read = latents
        if matching is not None:
            read = replace(latents, frames=1, held=tuple(matching))
            if latents.frames > 1:
                frames[target] = matching
        decoders[target] = _part(
            model,
            "decoder",
            layout,
            gridded("decoder", read, target),
            target=target,
            outputs_per_variable=head.outputs_per_variable,
            **({"embedding": encoder.embedding} if writes_tokens else {}),
        )
    composed = (
        Rollout if any(getattr(target, "feeds", "") for target in layout.targets.values()) else EncodeProcessDecode
    )
    return composed(
        encoder,
        processor,
        decoders,
        layout=layout,
        head=head,
        adapter=adapters,
        condition=condition,
        film=_film(model, layout, encoder, processor, *adapters.values()) if embedder == "all" else None,
        frames=frames,
    )


def _encoder(model: Mapping[str, Any], layout: Layout) -> nn.Module:
    """The encoder, told what it must know of the processor behind it."""
    processor, encoder = part_class(model["processor"]), part_class(model["encoder"])
    injected = {}
    if "carries_context" in inspect.signature(encoder).parameters:
        injected["carries_context"] = getattr(processor, "accepts_context", False)
    if model["encoder"].get("frames") == "auto":
        recurrent = model["encoder"].get("inputs_per_iteration") == "timestep"
        each = getattr(processor, "has_time_axis", False) and layout.frames > 1 and not recurrent
        model = {**model, "encoder": {**model["encoder"], "frames": "each" if each else "joint"}}
    return _part(model, "encoder", layout, **injected)


def _film(model: Mapping[str, Any], layout: Layout, encoder: nn.Module, *parts: nn.Module) -> LeadTimeFiLM:
    """What tells encoder, processor and adapters the lead time, with the options of a decoder that has such ones."""
    named = {"lead_features": "features", "film_hidden": "hidden", "film": "generator"}
    options = {named[key]: value for key, value in part_options(model["decoder"]).items() if key in named}
    trained = {lead for target in layout.targets.values() for lead in target.trained_lead_times}
    modulated = getattr(encoder, "accepts_modulation", False)
    return LeadTimeFiLM(
        LeadTimeFiLM.layers_of(encoder, *parts),
        lead_times=sorted(trained),
        token_width=None if modulated else encoder.latent_layout.hidden_size,
        **options,
    )


def load(checkpoint: str | Path, *, ema: bool = True) -> EncodeProcessDecode:
    """The model of a checkpoint folder, in evaluation mode; its averaged weights where it has them and `ema` is on; or
    of a file that `python -m training.export` made of one.

    Composes nothing: the checkpoint holds its configuration. Runs no code from it. Raises ValueError, OSError.
    """
    place = Path(checkpoint)
    stored = description(place)
    if stored.get("format") != FORMAT:
        raise ValueError(f"{place} has checkpoint format {stored.get('format')}, this version reads {FORMAT}")
    config = OmegaConf.create({"model": stored["model"], "task": stored["task"]})
    if config.model.attention in ("cudnn", "flex") and not torch.cuda.is_available():
        config.model.attention = "auto"  # how attention is computed is no part of the weights
        for part in ("encoder", "processor", "decoder"):
            if "attention" in config.model[part]:
                config.model[part].attention = "auto"
    model = build_from_config(config, Layout.from_dict(stored["layout"]))
    _fill(model, place, "ema" if ema and stored["averaged"] else "model")
    return model.eval()


def _fill(model: nn.Module, place: Path, name: str) -> None:
    from safetensors import SafetensorError

    try:
        fill(model, place, name)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise ValueError(f"{place} lacks {missing}; use another checkpoint of the run, like last") from error
    except (SafetensorError, RuntimeError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the weights {name!r} of {place} are damaged or of another model or version ({reason}); use another "
            "checkpoint, or train again"
        ) from error


def _part(model: Mapping[str, Any], place: str, *layouts: Layout | LatentLayout, **injected: Any) -> nn.Module:
    return part_class(model[place])(*layouts, **injected, **part_options(model[place]))


def _composed(overrides: Sequence[str], searched: Sequence[str] = ()) -> DictConfig:
    """Composes conf/train.yaml in its own Hydra, then restores the running one. searched: folders with more options."""
    from conf import schema

    schema.register()
    added = [str(folder) for folder in searched if Path(folder).resolve() != CONFIG_FOLDER]
    paths = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in added)}]"] if added else []
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_FOLDER)):
            return hydra_compose("train", overrides=[*overrides, *paths])
    finally:
        GlobalHydra.instance().hydra = running
