"""How the outputs of each project are computed with our model: a batch from its arrays, results in its axis order.

A file holds `state/<weight>`, `config` (JSON), inputs, `output` or `output/<name>`, and may hold `loss` and
`grad/<weight>` of loss = mean(output * linspace(-1, 1, output.numel())).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import Batch, Condition
from data.field import Field
from data.layout import Layout
from data.observations import Observations, check
from data.sequence import Sequence
from models.convert import TARGET, perceiver_ar, physicsnemo, recognise, token_batch
from models.convert.perceiver import INPUT


@dataclass(frozen=True)
class Golden:
    """The content of a file. arrays: all but state and config, by name."""

    source: str
    state: dict[str, np.ndarray]
    config: dict
    arrays: dict[str, np.ndarray]

    @staticmethod
    def read(path: Path) -> Golden:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        state = {name.removeprefix("state/"): arrays.pop(name) for name in list(arrays) if name.startswith("state/")}
        return Golden(recognise(state), state, json.loads(str(arrays.pop("config"))), arrays)

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays named prefix/<name>, by that name; one named prefix alone has the name ""."""
        parts = {name: name.split("/", 1) for name in self.arrays}
        return {"".join(rest): self.arrays[name] for name, (head, *rest) in parts.items() if head == prefix}


class TokenSequences:
    """Perceivers: raw token sequences in; latents and logits out."""

    def num_tokens(self, inputs: Mapping[str, Tensor]) -> int:
        return inputs["x"].shape[1]

    def batch(self, layout: Layout, inputs: Mapping[str, Tensor], golden: Golden) -> Batch:
        keep = inputs["valid"].bool() if "valid" in inputs else None
        if "pad_mask" in inputs:  # krasserm's mask marks what is padding
            keep = ~inputs["pad_mask"].bool()
        return token_batch(layout, inputs["x"], keep)

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch)[TARGET][:, 0].transpose(1, 2)
        return {"": logits, "logits": logits, "latents": model.processor(model.encoder(batch)).tokens[:, 0]}


class TokenIds:
    """Perceiver AR: tokens and how many of them are prefix in; logits of the others out."""

    def num_tokens(self, inputs: Mapping[str, Tensor]) -> int:
        return inputs["tokens"].shape[1]

    def batch(self, layout: Layout, inputs: Mapping[str, Tensor], golden: Golden) -> Batch:
        padding = inputs.get("pad_mask")  # True marks what is padding
        tokens, prefix_len = inputs["tokens"], int(inputs["prefix_len"])
        given = Sequence(tokens, None if padding is None else ~padding.bool(), prefix_len)
        wanted = Sequence(torch.zeros_like(tokens[:, prefix_len:]))
        return Batch({perceiver_ar.TOKENS: given}, {perceiver_ar.TOKENS: wanted}, layout)

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch)[perceiver_ar.TOKENS]
        return {"": logits, "logits": logits}


class PooledImages(TokenSequences):
    """lucidrains' Perceivers: sequences, images or videos (B, *axes, channels) in; one row of logits out."""

    def num_tokens(self, inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(inputs["x"].shape[1:-1])

    def batch(self, layout: Layout, inputs: Mapping[str, Tensor], golden: Golden) -> Batch:
        return token_batch(layout, inputs["x"], inputs["mask"].bool() if "mask" in inputs else None)

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch)[TARGET][:, 0, :, 0]
        return {"": logits, "logits": logits, "latents": model.encoder(batch).tokens[:, 0]}


class Texts(TokenSequences):
    """transformers' masked language model: token ids (B, M) in, scores of the vocabulary (B, M, V) out."""

    def num_tokens(self, inputs: Mapping[str, Tensor]) -> int:
        return inputs["ids"].shape[1]

    def batch(self, layout: Layout, inputs: Mapping[str, Tensor], golden: Golden) -> Batch:
        vocabulary = len(layout.inputs[INPUT].variables)
        tokens = torch.nn.functional.one_hot(inputs["ids"], vocabulary).float()
        return token_batch(layout, tokens, inputs["valid"].bool() if "valid" in inputs else None)


class Images(TokenSequences):
    """transformers' image classifier: pixels (B, channels, H, W) in, logits (B, classes) out."""

    def num_tokens(self, inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(inputs["x"].shape[2:])

    def batch(self, layout: Layout, inputs: Mapping[str, Tensor], golden: Golden) -> Batch:
        return token_batch(layout, inputs["x"].movedim(1, -1))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"": model(batch)[TARGET][:, 0, :, 0]}


class TextClasses(Texts):
    """transformers' classifier of texts: token ids (B, M) in, logits (B, classes) out."""

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"": model(batch)[TARGET][:, 0, :, 0]}


class Flow(TokenSequences):
    """transformers' optical flow: patches of two images (B, 2, channels, H, W) in, flow (B, H, W, 2) in pixels out."""

    def num_tokens(self, inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(inputs["x"].shape[3:])

    def batch(self, layout: Layout, inputs: Mapping[str, Tensor], golden: Golden) -> Batch:
        return token_batch(layout, inputs["x"].flatten(1, 2).movedim(1, -1))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"": model(batch)[TARGET][:, 0].movedim(1, -1) / 100}


class HEALPixFrames:
    """HealDA: frames (B, C, T, X), observations with their flat cell ids, and a noise level in; frames out."""

    def num_tokens(self, inputs: Mapping[str, Tensor]) -> int:
        return 1

    def batch(self, layout: Layout, inputs: Mapping[str, Tensor], golden: Golden) -> Batch:
        given, wanted = layout.inputs[physicsnemo.INPUT], layout.targets[physicsnemo.TARGET]
        values = inputs["x"].transpose(1, 2)
        times = (torch.arange(values.shape[1]) * given.step).expand(values.shape[0], -1)
        clock = {name: inputs[name].float() for name in ("second_of_day", "day_of_year")}
        blank = torch.zeros(*times.shape, len(wanted.variables), *wanted.grid.shape)
        return Batch(
            inputs={physicsnemo.INPUT: Field(values, given.variables, given.grid, times, **clock)},
            targets={physicsnemo.TARGET: Field(blank, wanted.variables, wanted.grid, times, **clock)},
            layout=layout,
            observations=self._observations(layout, golden, times, clock),
            condition=Condition(inputs["t"].float(), inputs.get("class_labels")),
        )

    def _observations(self, layout: Layout, golden: Golden, times: Tensor, clock: Mapping[str, Tensor]) -> Observations:
        rows = {name: torch.from_numpy(array) for name, array in golden.group("obs").items()}
        cells = 12 * 4 ** {**physicsnemo.DEFAULTS, **golden.config}["level_model"]
        flat = rows["flat_pixel"].long()
        observations = Observations(
            value=rows["value"].float(),
            batch=flat // (times.shape[1] * cells),
            frame=flat // cells % times.shape[1],
            cell=flat % cells,
            channel=rows["channel"].long(),
            platform=rows["platform"].long(),
            type=rows["obs_type"].long(),
            features=rows["float_metadata"].float(),
            times=times,
            **clock,
        )
        check(observations, layout.observations, cells)
        return observations

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"": model(batch)[physicsnemo.TARGET].transpose(1, 2)}


COMPARISONS = {
    "transformers": TokenSequences(),
    "perceiver_io": TokenSequences(),
    "perceiver_ar": TokenIds(),
    "physicsnemo": HEALPixFrames(),
    "healda": HEALPixFrames(),
    "transformers_image": Images(),
    "transformers_image_learned": Images(),
    "transformers_text": Texts(),
    "transformers_text_classes": TextClasses(),
    "transformers_flow": Flow(),
    "lucidrains": PooledImages(),
    "lucidrains_0.9": PooledImages(),
}
