"""The one composed model: encode the inputs to latents, process them, decode one output a target.

    latents = processor(encoder(batch) with the embedded condition)
    output[target] = decoder[target](latents, query of the target)

With `model.condition=all` every part knows the lead time, as in MetNet (arXiv:2306.06079): everything runs again for
each of them, (B, L) becoming B L samples of one lead time. Otherwise it encodes once and decodes many.

Where all times of a target are times of latent frames (an analysis), its decoder gets the frame of each time as a
sample of its own; otherwise (a forecast) it gets all frames.

Letters: B batch, T frames, L lead times, N tokens, D hidden, C variables, K outputs per variable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from data.batch import Batch, Condition, Query
from data.layout import Layout, SequenceLayout
from models.attention import Modulations
from models.conditioning.lead_time import LeadTimeFiLM, warn_beyond_training
from models.heads import DeterministicHead, Prediction, TokenHead, TokenPrediction
from models.latents import Latents
from models.summary import describe

__all__ = ["EncodeProcessDecode", "describe"]


class EncodeProcessDecode(nn.Module):
    """Batch -> {target: (B, L, C * K, *grid.shape)}.

    decoder: one decoder a target, by its name. adapter: grid adapters that the builder put before "processor" or before
    the decoder of a target. layout: what the parts were built for. head: gives outputs their meaning. condition: embeds
    noise level and label. film: tells encoder, processor and adapters the lead time, or None. frames: the latent frame
    of each time of a target, for targets at several frames' times.
    """

    def __init__(
        self,
        encoder: nn.Module,
        processor: nn.Module,
        decoder: nn.ModuleDict,
        *,
        layout: Layout,
        head: DeterministicHead | TokenHead,
        adapter: nn.ModuleDict | None = None,
        condition: nn.Module | None = None,
        film: LeadTimeFiLM | None = None,
        frames: Mapping[str, list[int]] | None = None,
    ):
        super().__init__()
        self.encoder, self.processor, self.decoder = encoder, processor, decoder
        self.adapter = nn.ModuleDict() if adapter is None else adapter
        self.condition, self.film = condition, film
        self.layout, self.head, self.frames = layout, head, dict(frames or {})
        if layout.crops:
            self._check_reads_coordinates()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Raises ValueError where the batch is not what the model was built for."""
        self.validate(batch)
        if self.film is not None:
            return {name: self._each_lead_time(name, batch, query) for name, query in batch.queries().items()}
        latents = self._latents(batch)
        return {name: self._decode(name, latents, query) for name, query in batch.queries().items()}

    def _latents(self, batch: Batch, modulation: Modulations | None = None) -> Latents:
        """modulation: of every sample by its one lead time, with `film`."""
        if modulation is None:
            latents = self.encoder(batch)
        elif getattr(self.encoder, "accepts_modulation", False):
            latents = replace(self.encoder(batch, modulation=modulation), modulation=modulation)
        else:  # its tokens are modulated instead
            latents = replace(self.encoder(batch), modulation=modulation)
            tokens = self.film.tokens(latents.tokens.flatten(1, 2), modulation)
            latents = latents.with_tokens(tokens.view_as(latents.tokens))
        if self.condition is not None:
            latents = replace(latents, condition=self.condition(self._given_condition(batch)))
        return self.processor(self._adapted("processor", latents))

    def _each_lead_time(self, name: str, batch: Batch, query: Query) -> Tensor:
        """(B, L, C K, ...) of one target, every lead time from its own encoding."""
        modulation = self.film(query.lead_time.flatten())
        latents = self._latents(batch.repeated(query.times.shape[1]), modulation)
        output = self._decode(name, latents, query.each_time())  # (B L, 1, C K, ...)
        return output[:, 0].unflatten(0, tuple(query.times.shape))

    def _decode(self, name: str, latents: Latents, query: Query | None) -> Tensor:
        if name not in self.frames:
            return self.decoder[name](self._adapted(name, latents), query)
        first, count = latents.frames[0], latents.tokens.shape[1]
        frames = [frame - first for frame in self.frames[name] if first <= frame < first + count]
        latents = self._adapted(name, latents.of_frames(frames))
        output = self.decoder[name](latents, query.each_time())  # (B L, 1, C K, ...)
        return output[:, 0].unflatten(0, tuple(query.times.shape))

    def _given_condition(self, batch: Batch) -> Condition:
        """The batch's condition, or noise level 0 for all samples."""
        if batch.condition is not None:
            return batch.condition
        return Condition(noise_level=torch.zeros(batch.batch_size, device=batch.base_time.device))

    def draw_places(self, fraction: float) -> dict[str, Tensor]:
        """A random share of the output places of every target whose decoder can leave the others out."""
        partial = {name: decoder for name, decoder in self.decoder.items() if hasattr(decoder, "draw_places")}
        return {name: decoder.draw_places(fraction) for name, decoder in partial.items()}

    def predict(self, batch: Batch) -> dict[str, Prediction | TokenPrediction]:
        """Predictions in physical units; the targets' values are not read, their references are."""
        return {name: self.head.predict(output, batch.targets[name]) for name, output in self(batch).items()}

    def validate(self, batch: Batch) -> None:
        """Raises ValueError, one sentence, when inputs or targets differ from the layout of the model.

        Lead times may differ: they are data of the query; those beyond the trained ones are warned of. Grids may, where
        the encoder reads and the decoder writes any.
        """
        warn_beyond_training(self.layout, batch.layout)
        self._check_crops(batch)
        if batch.layout is self.layout:
            return
        any_grid = getattr(self.encoder, "reads_any_grid", False)
        for name, item in self.layout.inputs.items():
            given = batch.layout.inputs.get(name)
            if given != item and not (any_grid and given is not None and replace(given, grid=item.grid) == item):
                raise ValueError(
                    f"input {name!r} of this batch is not what the model was built for ({_summary(item)}); "
                    "build the model with the layout of this data, or read data of the same variables, grid and frames"
                )
        if batch.layout.observations != self.layout.observations:
            raise ValueError(
                f"the observations of this batch ({batch.layout.observations}) are not what the model was built for "
                f"({self.layout.observations}); build the model with the layout of this data"
            )
        for name, item in self.layout.targets.items():
            given = batch.layout.targets.get(name)
            known = given is not None and _predicted(given) == _predicted(item)
            if not known and not (
                getattr(self.decoder[name], "writes_any_grid", False)
                and given is not None
                and given.variables == item.variables
            ):
                raise ValueError(
                    f"target {name!r} of this batch is not what the model was built for ({_summary(item)}); "
                    "build the model with the layout of this data, or ask for the same variables on the same grid"
                )

    def _check_crops(self, batch: Batch) -> None:
        fields = [*batch.inputs.values(), *batch.targets.values()]
        if any(getattr(field, "coordinates", None) is not None for field in fields):
            self._check_reads_coordinates()

    def _check_reads_coordinates(self) -> None:
        """Raises ValueError where a part does not read the places that crops bring."""
        for part, instead in (
            (self.encoder, "model/encoder=perceiver"),
            *((decoder, "model/decoder=lead_time") for decoder in self.decoder.values()),
        ):
            if not getattr(part, "reads_coordinates", False):
                raise ValueError(
                    f"samples are crops with coordinates of their own, which {type(part).__name__} does not read; use "
                    f"{instead}"
                )

    def _adapted(self, place: str, latents: Latents) -> Latents:
        return self.adapter[place](latents) if place in self.adapter else latents


def _predicted(item) -> tuple:
    """What of a target a model is built for."""
    return (item,) if isinstance(item, SequenceLayout) else (item.variables, item.grid)


def _summary(item) -> str:
    if isinstance(item, SequenceLayout):
        return f"up to {item.length} tokens of a vocabulary of {item.vocab_size}"
    names = ", ".join(variable.label for variable in item.variables)
    frames = f", {item.frames} frames" if hasattr(item, "frames") else ""
    return f"{names} on {item.grid.kind} {tuple(item.grid.shape)}{frames}"
