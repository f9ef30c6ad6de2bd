"""The one composed model: encode the inputs to latents, process them, decode one output a target.

    latents = processor(encoder(batch))
    output[target] = decoder[target](latents, query of the target)

Letters: B batch, T frames, L lead times, N tokens, D hidden, C variables, K outputs per variable.
"""

from __future__ import annotations

from torch import Tensor, nn

from data.batch import Batch, Layout
from models.heads import DeterministicHead, Prediction
from models.latents import Latents
from models.summary import describe

__all__ = ["EncodeProcessDecode", "describe"]


class EncodeProcessDecode(nn.Module):
    """Batch -> {target: (B, L, C * K, *grid.shape)}.

    decoder: one decoder a target, by its name. adapter: grid adapters that the builder put before "processor" or before
    the decoder of a target. layout: what the parts were built for. head: gives outputs their meaning.
    """

    def __init__(
        self,
        encoder: nn.Module,
        processor: nn.Module,
        decoder: nn.ModuleDict,
        *,
        layout: Layout,
        head: DeterministicHead,
        adapter: nn.ModuleDict | None = None,
    ):
        super().__init__()
        self.encoder, self.processor, self.decoder = encoder, processor, decoder
        self.adapter = nn.ModuleDict() if adapter is None else adapter
        self.layout, self.head = layout, head

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Raises ValueError where the batch is not what the model was built for."""
        self.validate(batch)
        latents = self.processor(self._adapted("processor", self.encoder(batch)))
        return {
            name: self.decoder[name](self._adapted(name, latents), query) for name, query in batch.queries().items()
        }

    def draw_places(self, fraction: float) -> dict[str, Tensor]:
        """A random share of the output places of every target whose decoder can leave the others out."""
        partial = {name: decoder for name, decoder in self.decoder.items() if hasattr(decoder, "draw_places")}
        return {name: decoder.draw_places(fraction) for name, decoder in partial.items()}

    def predict(self, batch: Batch) -> dict[str, Prediction]:
        """Predictions in physical units; the targets' values are not read, their references are."""
        return {name: self.head.predict(output, batch.targets[name]) for name, output in self(batch).items()}

    def validate(self, batch: Batch) -> None:
        """Raises ValueError, one sentence, when inputs or targets differ from the layout of the model.

        Lead times may differ: they are data of the query.
        """
        if batch.layout is self.layout:
            return
        for name, item in self.layout.inputs.items():
            if batch.layout.inputs.get(name) != item:
                raise ValueError(
                    f"input {name!r} of this batch is not what the model was built for ({_summary(item)}); "
                    "build the model with the layout of this data, or read data of the same variables, grid and frames"
                )
        for name, item in self.layout.targets.items():
            given = batch.layout.targets.get(name)
            if given is None or (given.variables, given.grid) != (item.variables, item.grid):
                raise ValueError(
                    f"target {name!r} of this batch is not what the model was built for ({_summary(item)}); "
                    "build the model with the layout of this data, or ask for the same variables on the same grid"
                )

    def _adapted(self, place: str, latents: Latents) -> Latents:
        return self.adapter[place](latents) if place in self.adapter else latents


def _summary(item) -> str:
    names = ", ".join(variable.label for variable in item.variables)
    frames = f", {item.frames} frames" if hasattr(item, "frames") else ""
    return f"{names} on {item.grid.kind} {tuple(item.grid.shape)}{frames}"
