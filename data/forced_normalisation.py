"""Statistics of a prognostic series and of the streams that force it, each fitted on its own grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from data.normalisation import Normalisation

if TYPE_CHECKING:
    from data.datasets.forced_data import ForcedData


@dataclass(frozen=True)
class ForcedNormalisation(Normalisation):
    """A `Normalisation` of the prognostic series; streams: those of the streams, by name."""

    streams: dict[str, Normalisation]

    @staticmethod
    def fit(data: ForcedData, *, lead_steps: Sequence[int]) -> ForcedNormalisation:
        """Raises ValueError where no two frames of the training period are a lead time apart."""
        own = Normalisation.fit(data, lead_steps=lead_steps)
        streams = {name: Normalisation.fit(stream, lead_steps=()) for name, stream in data.streams.items()}
        return ForcedNormalisation(**vars(own), streams=streams)

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        own = Normalisation(**{key: value for key, value in vars(self).items() if key != "streams"})
        tensors, description = own.state_dict()
        described = {}
        for name, stream in self.streams.items():
            parts, described[name] = stream.state_dict()
            tensors |= {f"{name}.{key}": part for key, part in parts.items()}
        return tensors, {"kind": "forced", **description, "streams": described}

    @staticmethod
    def from_state(tensors: dict[str, Tensor], description: dict) -> ForcedNormalisation:
        streams = {
            name: Normalisation.from_state(_under(f"{name}.", tensors), stored)
            for name, stored in description["streams"].items()
        }
        own = Normalisation.from_state({key: part for key, part in tensors.items() if "." not in key}, description)
        return ForcedNormalisation(**vars(own), streams=streams)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): part for key, part in tensors.items() if key.startswith(prefix)}
