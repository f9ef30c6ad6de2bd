"""NVIDIA PhysicsNeMo's HealDA v2 (`VideoHealDA`) on CPU, for `python -m benchmarks healda_cpu`."""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch
from data.healpix import cell_to_angles, num_cells
from models.convert.physicsnemo import INPUT

NAME = "physicsnemo"
INSTALL = "pip install nvidia-physicsnemo==2.2.2"


def installed() -> bool:
    return importlib.util.find_spec(NAME) is not None


class PhysicsNeMo(nn.Module):
    """`VideoHealDA(**config)`, reading our batches."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        _give_longitudes()
        from physicsnemo.experimental.models.healda.obs_context import prepare_obs_context
        from physicsnemo.experimental.models.healda.video_healda import VideoHealDA

        self.model, self.prepare = VideoHealDA(**config), prepare_obs_context
        self.frame_cells = num_cells(config["level_model"])

    def forward(self, batch: Batch) -> Tensor:
        field, rows = batch.inputs[INPUT], batch.observations
        cells, frames = self.frame_cells, field.values.shape[1]
        context = self.prepare(
            obs=rows.value,
            float_metadata=rows.features,
            obs_type=rows.type.long(),
            channel=rows.channel.long(),
            platform=rows.platform.long(),
            flat_idx=(rows.flat_frame() * cells + rows.cell).int(),
            total_pixels=batch.batch_size * frames * cells,
        )
        values = field.values.transpose(1, 2).contiguous()
        noise_level = torch.zeros(batch.batch_size)
        return self.model(values, noise_level, field.second_of_day, field.day_of_year, context, None)


def _give_longitudes() -> None:
    """earth2grid, which is on no package index, is asked only for the longitudes of the latent cells: ours."""
    if importlib.util.find_spec("earth2grid") is not None:
        return

    class Grid:
        def __init__(self, level: int, pixel_order: str):
            latitude, longitude = cell_to_angles(torch.arange(num_cells(level)), level, "padxy")
            self.lat, self.lon = latitude.numpy(), longitude.numpy()

    contents = {"": {}, ".healpix": {"Grid": Grid, "HEALPIX_PAD_XY": "padxy"}, ".healpix._padding": {"pad": None}}
    for suffix, attributes in contents.items():
        module = ModuleType(f"earth2grid{suffix}")
        module.__spec__, module.__path__ = ModuleSpec(module.__name__, None, is_package=True), []
        vars(module).update(attributes)
        sys.modules[module.__name__] = module
    version = metadata.version
    metadata.version = lambda name: "2025.7.1" if name == "earth2grid" else version(name)
