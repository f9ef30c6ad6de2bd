"""Combinations of parts and data that make no sense: one table, each row with its sentence. Everything else runs.

A part that needs latents on a grid gets an adapter (`models/adapters.py`) where they are not: see `adapter_grid`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any

from data.grids import ROWS_AND_COLUMNS, Grid
from data.healpix import HEALPixGrid
from data.layout import InputLayout, Layout, TargetLayout
from models.checks import part_class
from models.decoders.grouped_reconstruction import rows_of_target
from models.latents import LatentLayout

CELLS = ROWS_AND_COLUMNS | HEALPixGrid  # what patches of cells tile


@dataclass(frozen=True)
class Refusal:
    """applies(model, layout): whether the combination is refused; sentence: why, and the override to use instead."""

    applies: Callable[[Mapping[str, Any], Layout], bool]
    sentence: str


def _is(model: Mapping[str, Any], place: str, name: str) -> bool:
    return part_class(model[place]).__name__ == name


def _has_grid(layout: Layout, kinds: UnionType) -> bool:
    described = [*layout.inputs.values(), *layout.targets.values()]
    return any(isinstance(item.grid, kinds) for item in described)


def _all_on(described: Mapping[str, InputLayout | TargetLayout], kinds: UnionType) -> bool:
    """Whether all inputs, or all targets, are on grids of these kinds."""
    return all(isinstance(item.grid, kinds) for item in described.values())


def _on_one_grid(layout: Layout) -> bool:
    return len({item.grid for item in layout.inputs.values()}) <= 1


def _in_step(layout: Layout) -> bool:
    """Whether inputs have equally many frames; one frame stands for all."""
    return len({item.frames for item in layout.inputs.values()} - {1}) <= 1


def _trait(model: Mapping[str, Any], place: str, name: str) -> bool:
    return getattr(part_class(model[place]), name, False)


REFUSALS = (
    # Rows about tokens come first: later ones ask every input for its grid.
    Refusal(
        lambda model, layout: bool(layout.sequences) and not _trait(model, "encoder", "reads_tokens"),
        "the task gives sequences of tokens, which this encoder does not read; use model/encoder=token",
    ),
    Refusal(
        lambda model, layout: bool(layout.sequences) and not _trait(model, "decoder", "writes_tokens"),
        "the task wants scores of tokens, which this decoder does not write; use model/decoder=token",
    ),
    Refusal(
        lambda model, layout: bool(layout.sequences) and not _trait(model, "processor", "causal"),
        "this processor lets a token read those that it must predict; use model/processor=perceiver_ar",
    ),
    Refusal(
        lambda model, layout: not layout.sequences and _trait(model, "encoder", "reads_tokens"),
        "model/encoder=token reads sequences of tokens, and the inputs are fields; "
        "use model/encoder=perceiver or task=autoregressive",
    ),
    Refusal(
        lambda model, layout: not layout.sequences and _trait(model, "decoder", "writes_tokens"),
        "model/decoder=token writes scores of tokens, and the targets are fields; "
        "use model/decoder=perceiver_io or task=autoregressive",
    ),
    Refusal(
        lambda model, layout: not layout.sequences and _is(model, "processor", "PerceiverAR"),
        "model/processor=perceiver_ar reads sequences of tokens, and the inputs are fields; "
        "use model/processor=latent_transformer or task=autoregressive",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "encoder", "GridPatchEncoder") and not _all_on(layout.inputs, ROWS_AND_COLUMNS)
        ),
        "model/encoder=grid_patch cuts grids of rows and columns into patches, and an input is not on one; "
        "use model/encoder=perceiver",
    ),
    Refusal(
        lambda model, layout: _is(model, "encoder", "GridPatchEncoder") and not _on_one_grid(layout),
        "model/encoder=grid_patch needs all inputs on one grid; use model/encoder=cross_resolution",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "encoder", "MonthlyVideoEncoder")
            and (not _all_on(layout.inputs, ROWS_AND_COLUMNS) or not _on_one_grid(layout))
            and model["encoder"].get("geography") != "given"
        ),
        "model/encoder=monthly_video needs all inputs on one grid of rows and columns; use model/encoder=perceiver",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "decoder", "MonthlyConvDecoder") and not _all_on(layout.targets, ROWS_AND_COLUMNS)
        ),
        "model/decoder=monthly_conv writes grids of rows and columns, and a target is not on one; "
        "use model/decoder=perceiver_io",
    ),
    Refusal(
        lambda model, layout: (
            layout.observations is not None and not getattr(part_class(model["encoder"]), "reads_observations", False)
        ),
        "this encoder reads no observations, and the data has them; use model/encoder=video_patch or perceiver",
    ),
    Refusal(
        lambda model, layout: _is(model, "encoder", "VideoPatchEncoder") and not _all_on(layout.inputs, CELLS),
        "model/encoder=video_patch cuts rows and columns or HEALPix cells into patches, and an input is on neither; "
        "use model/encoder=perceiver",
    ),
    Refusal(
        lambda model, layout: _is(model, "encoder", "VideoPatchEncoder") and not _on_one_grid(layout),
        "model/encoder=video_patch needs all inputs on one grid; use model/encoder=cross_resolution",
    ),
    Refusal(
        lambda model, layout: _is(model, "decoder", "VideoPatchDecoder") and not _all_on(layout.targets, CELLS),
        "model/decoder=video_patch writes rows and columns or HEALPix cells, and a target is on neither; "
        "use model/decoder=perceiver_io",
    ),
    Refusal(
        lambda model, layout: (
            part_class(model["encoder"]).__name__
            in ("PerceiverEncoder", "LocalPerceiverEncoder", "CrossResolutionEncoder")
            and model["encoder"].get("frames") == "each"
            and not _in_step(layout)
        ),
        "model.encoder.frames=each needs inputs of equally many frames; use model.encoder.frames=joint",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "encoder", "PerceiverEncoder")
            and model["encoder"].get("inputs_per_iteration") == "timestep"
            and not _in_step(layout)
        ),
        "model.encoder.inputs_per_iteration=timestep needs inputs of equally many frames; "
        "use model.encoder.inputs_per_iteration=all",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "encoder", "PerceiverEncoder")
            and model["encoder"].get("inputs_per_iteration") == "timestep"
            and model["encoder"].get("frames") == "each"
        ),
        "model.encoder.frames=each reads one frame at a time already; use model.encoder.inputs_per_iteration=all",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "decoder", "GridPatchDecoder") and not _all_on(layout.targets, ROWS_AND_COLUMNS)
        ),
        "model/decoder=grid_patch writes grids of rows and columns, and a target is not on one; "
        "use model/decoder=perceiver_io",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "processor", "SpatialTransformer")
            and not (_has_grid(layout, ROWS_AND_COLUMNS) or _trait(model, "encoder", "lays_rows"))
        ),
        "model/processor=spatial_transformer needs a grid of rows and columns, and no input or target has one; "
        "use model/processor=latent_transformer",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "processor", "VideoDiT")
            and model["processor"].get("radius") is not None
            and not all(item.grid.geographic for item in layout.inputs.values())
        ),
        "model.processor.radius is in degrees on the sphere, and an input has no geography; "
        "use model.processor.radius=null",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "decoder", "PerceiverIODecoder")
            and "local" in (model["decoder"].get("scope"), model["decoder"].get("queries"))
            and not (_has_grid(layout, CELLS) or _trait(model, "encoder", "lays_rows"))
        ),
        "local queries need rows and columns or a HEALPix grid, and no input or target has one; "
        "use model.decoder.scope=global",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "decoder", "GroupedReconstructionDecoder")
            and not (_is(model, "encoder", "HierarchicalPerceiverEncoder") and model["encoder"].get("fan_out"))
        ),
        "model/decoder=grouped_reconstruction writes what a hierarchy read back at the cells of its inputs; "
        "use model/encoder=hip_mini",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "decoder", "GroupedReconstructionDecoder") and _trait(model, "processor", "requires_grid")
        ),
        "this processor puts other cells in the place of those that model/decoder=grouped_reconstruction writes; "
        "use model/processor=identity",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "decoder", "GroupedReconstructionDecoder")
            and any(rows_of_target(layout, target) is None for target in layout.targets)
        ),
        "model/decoder=grouped_reconstruction writes inputs back, and a target is none; use model/decoder=perceiver_io",
    ),
    Refusal(
        lambda model, layout: (
            _is(model, "decoder", "PooledDecoder")
            and any(target.grid.num_points > 1 for target in layout.targets.values())
        ),
        "model/decoder=pooled gives one answer a sample, and a target has many places; use model/decoder=perceiver_io",
    ),
    Refusal(
        lambda model, layout: (
            layout.observations is not None
            and _is(model, "encoder", "HierarchicalPerceiverEncoder")
            and model["encoder"].get("grouping") == "stream"
        ),
        "model.encoder.grouping=stream hands groups out to fields, and the data has observations; "
        "use model.encoder.grouping=time",
    ),
    Refusal(
        lambda model, layout: (
            model.get("condition") == "all"
            and (bool(layout.sequences) or any(layout.frames_of(name) is not None for name in layout.targets))
        ),
        "model.condition=all runs again for every lead time, and a target has none (tokens, or an analysis); "
        "use model.condition=decoder",
    ),
)


def refuse(model: Mapping[str, Any], layout: Layout) -> None:
    """Raises ValueError with the sentence of the first row that applies. model: the resolved `model` configuration."""
    for row in REFUSALS:
        if row.applies(model, layout):
            raise ValueError(row.sentence)


def adapter_grid(
    part: type, options: Mapping[str, Any], latents: LatentLayout, layout: Layout, target: str | None
) -> Grid | None:
    """The grid that latents must be adapted to before this part, or None where they suit it."""
    if not getattr(part, "requires_grid", lambda _: False)(options):
        return None
    wanted = layout.targets[target].grid if target is not None else None
    kinds = ROWS_AND_COLUMNS if _requires_rows(part) else CELLS
    suits = isinstance(latents.grid, kinds)
    if suits and (not getattr(part, "writes_latent_grid", False) or latents.grid.find(wanted) is not None):
        return None
    grids = [wanted, *(item.grid for item in [*layout.inputs.values(), *layout.targets.values()])]
    return next(grid for grid in grids if isinstance(grid, kinds))


def _requires_rows(part: type) -> bool:
    """Whether the part works on rows and columns: grids of rows and columns only."""
    return getattr(part, "requires_rows", True)
