"""transformers: its task models for text, images and optical flow (names and defaults of 5.23).

The same Perceiver IO as `transformers.py`, with what its task puts before and after it:

    PerceiverForMaskedLM                    tokens of a vocabulary, learned positions; the embedding scores the outputs
    PerceiverForSequenceClassification      tokens of a vocabulary, learned positions; classes
    PerceiverForImageClassificationFourier  pixels, Fourier positions; classes
    PerceiverForImageClassificationLearned  projected pixels, projected learned positions; classes
    PerceiverForOpticalFlow                 projected patches of two images, Fourier positions; what was read at a pixel
                                            asks for the flow there

Tokens come one-hot here, so that their embedding is a linear layer (`token_batch` of `torch.nn.functional.one_hot`).
What has no part here is refused (`UNSUPPORTED`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from data.grids import PlanarGrid
from data.layout import Layout, TargetLayout, Variable
from models.convert import transformers
from models.convert.perceiver import INPUT, TARGET, Perceiver, PerceiverSource, token_layout

_TRUNK = "perceiver."
_READ = f"{_TRUNK}input_preprocessor."
_EMBEDDING = f"{_READ}embeddings.weight"
_PLACES = f"{_READ}position_embeddings.weight"
_BIAS = "embedding_decoder.bias"
_TOKENS = f"encoder.inputs.{INPUT}"
_PIXELS, _BANDS, _MAX_FREQUENCY = 3, 64, 112  # of 224 rows and columns, whatever the image has
_TRAIN_SIZE = (368, 496)  # of flow: the default of the configuration

# How weights start that have no part here -> why.
UNSUPPORTED = {
    f"{_READ}convnet.": (
        "PerceiverForImageClassificationConvProcessing reads pixels through a convolution with batch norm and pooling, "
        "which no encoder here has; convert PerceiverForImageClassificationFourier or ...Learned"
    ),
    f"{_READ}modalities.": (
        "PerceiverForMultimodalAutoencoding pads images, audio and labels to one width, which no encoder here does; "
        "convert a model of one modality"
    ),
}


@dataclass(frozen=True)
class TaskSource(PerceiverSource):
    """A Perceiver IO inside a task model: `PerceiverModel` with a decoder inside a decoder."""

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = super().canonical(state, config)
        return {
            name.removeprefix(_TRUNK).replace("decoder.decoder.", "decoder.", 1): tensor
            for name, tensor in tensors.items()
        }

    def original(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse of `canonical`."""
        return {f"{_TRUNK}{'decoder.' * name.startswith('decoder.')}{name}": item for name, item in tensors.items()}


@dataclass(frozen=True)
class ImageSource(TaskSource):
    """Pixels and Fourier positions in, logits of classes out."""

    def overrides(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
        given = ["positions=fourier", f"num_bands={_BANDS}", f"max_frequency={_MAX_FREQUENCY}"]
        return [*super().overrides(config, weights), *(f"model.encoder.{item}" for item in given)]

    def layout(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], num_tokens: int | tuple) -> Layout:
        """num_tokens: rows and columns; one number stands for both."""
        axes = (num_tokens, num_tokens) if isinstance(num_tokens, int) else num_tokens
        outputs = weights[f"decoder.{TARGET}.head.weight"].shape[0]
        return token_layout(channels=_PIXELS, num_tokens=axes, outputs=outputs, queries=1)


@dataclass(frozen=True)
class LearnedImageSource(TaskSource):
    """Projected pixels and projected learned positions in, logits of classes out."""

    def names(self, config: Mapping[str, Any]) -> dict[str, str]:
        own = {f"{_TOKENS}.table": "input_preprocessor.position_embeddings.position_embeddings"}
        for ours, theirs in {"value": "convnet_1x1", "project": "positions_projection"}.items():
            for kind in ("weight", "bias"):
                own[f"{_TOKENS}.{ours}.{kind}"] = f"input_preprocessor.{theirs}.{kind}"
        return super().names(config) | own

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors, names = super().canonical(state, config), self.names(config)
        table, value = names[f"{_TOKENS}.table"], names[f"{_TOKENS}.value.weight"]
        return tensors | {table: tensors[table][None], value: tensors[value].flatten(1)}  # the convolution is 1 x 1

    def original(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        names = self.names(config)
        table, value = names[f"{_TOKENS}.table"], names[f"{_TOKENS}.value.weight"]
        plain = {table: tensors[table][0], value: tensors[value][..., None, None]}
        return super().original({**tensors, **plain}, config)

    def overrides(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
        width = weights[f"{_TOKENS}.value.weight"].shape[0]
        given = ["model.encoder.positions=projected", f"model.encoder.value_size={width}"]
        return [*super().overrides(config, weights), *given]

    def layout(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], num_tokens: int | tuple) -> Layout:
        """A square image of as many pixels as there are learned positions, whatever num_tokens says."""
        side = isqrt(weights[f"{_TOKENS}.table"].shape[1])
        outputs = weights[f"decoder.{TARGET}.head.weight"].shape[0]
        return token_layout(channels=_PIXELS, num_tokens=(side, side), outputs=outputs, queries=1)


@dataclass(frozen=True)
class FlowSource(TaskSource):
    """Patches of two images, joined as channels, in; the flow at every pixel out, in hundredths of a pixel.

    The query of a pixel is its token: the projected patch, then the features of its place. Here it is a sum of a linear
    layer of each, whose rows for the other's channels are 0.
    """

    def names(self, config: Mapping[str, Any]) -> dict[str, str]:
        names = super().names(config)
        for kind in ("weight", "bias"):
            names[f"{_TOKENS}.value.{kind}"] = f"input_preprocessor.conv_after_patches.{kind}"
            for part in ("feature", "position"):
                names[f"decoder.{TARGET}.{part}.{kind}"] = f"queries.{part}.{kind}"
        return names

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = super().canonical(state, config)
        return tensors | self._queries(tensors)

    def _queries(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight, bias = (tensors[f"input_preprocessor.conv_after_patches.{kind}"] for kind in ("weight", "bias"))
        width, places = weight.shape[0], 2 + 4 * _BANDS
        below = bias.new_zeros(places)
        return {
            "queries.feature.weight": torch.cat([weight, weight.new_zeros(places, weight.shape[1])]),
            "queries.feature.bias": torch.cat([bias, below]),
            "queries.position.weight": torch.cat([weight.new_zeros(width, places), torch.eye(places)]),
            "queries.position.bias": bias.new_zeros(width + places),
        }

    def original(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse of `canonical`. Raises ValueError where queries and tokens have been trained apart."""
        if any(not torch.equal(tensors[name], tensor) for name, tensor in self._queries(tensors).items()):
            raise ValueError(
                "transformers asks with the tokens that it reads, and the model's queries differ; export a tied copy"
            )
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("queries.")}
        return super().original(kept, config)

    def overrides(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
        width = weights[f"{_TOKENS}.value.weight"].shape[0]
        given = ["encoder.positions=fourier", f"encoder.value_size={width}"]
        given += [f"{part}.num_bands={_BANDS}" for part in ("encoder", "decoder")]
        return [*super().overrides(config, weights), *(f"model.{item}" for item in given)]

    def layout(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], num_tokens: int | tuple) -> Layout:
        """The size is the configuration's `train_size`, whatever num_tokens says."""
        axes = tuple(config.get("train_size", _TRAIN_SIZE))
        channels = weights[f"{_TOKENS}.value.weight"].shape[1]
        read = token_layout(channels=channels, num_tokens=axes, outputs=2, queries=1)
        flow = tuple(Variable(f"flow_{axis}", units="0.01 pixels") for axis in ("x", "y"))
        target = TargetLayout(flow, PlanarGrid.regular(*axes, units="pixels"), lead_times=(0,))
        return replace(read, targets={TARGET: target})


@dataclass(frozen=True)
class TextClassesSource(TaskSource):
    """One-hot tokens in, logits of classes out."""

    def names(self, config: Mapping[str, Any]) -> dict[str, str]:
        own = {f"{_TOKENS}.{name}": f"{_TOKENS}.{name}" for name in ("value.weight", "value.bias", "table")}
        return super().names(config) | own

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        found = super().canonical(state, config)
        embedding = found.pop(_EMBEDDING.removeprefix(_TRUNK))
        found[f"{_TOKENS}.table"] = found.pop(_PLACES.removeprefix(_TRUNK))[None]
        found[f"{_TOKENS}.value.weight"] = embedding.T
        found[f"{_TOKENS}.value.bias"] = embedding.new_zeros(embedding.shape[1])
        return found

    def original(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse of `canonical`. Raises ValueError where the embedding has learned a bias."""
        found = dict(tensors)
        if found.pop(f"{_TOKENS}.value.bias").any():
            raise ValueError("transformers embeds tokens without a bias, and the model has learned one; set it to 0")
        plain = {
            _EMBEDDING: found.pop(f"{_TOKENS}.value.weight").T.contiguous(),
            _PLACES: found.pop(f"{_TOKENS}.table")[0],
        }
        return plain | super().original(found, config)

    def overrides(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
        width = weights[f"{_TOKENS}.value.weight"].shape[0]
        given = ["model.encoder.positions=learned", f"model.encoder.value_size={width}"]
        return [*super().overrides(config, weights), *given]

    def layout(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], num_tokens: int | tuple) -> Layout:
        """The length is that of the learned positions, whatever num_tokens says."""
        _, length, _ = weights[f"{_TOKENS}.table"].shape
        outputs, queries = (weights[f"decoder.{TARGET}.{name}"].shape[0] for name in ("head.weight", "table"))
        vocabulary = weights[f"{_TOKENS}.value.weight"].shape[1]
        return token_layout(channels=vocabulary, num_tokens=length, outputs=outputs, queries=queries)


@dataclass(frozen=True)
class TextSource(TextClassesSource):
    """One-hot tokens in, scores of the vocabulary out, with tied embeddings."""

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        found = super().canonical(state, config)
        found["decoder.final_layer.weight"] = found[f"{_TOKENS}.value.weight"].T
        found["decoder.final_layer.bias"] = found.pop(_BIAS)
        return found

    def original(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse of `canonical`. Raises ValueError where embedding and read-out have been trained apart."""
        found = dict(tensors)
        read_out, bias = (found.pop(f"decoder.final_layer.{kind}") for kind in ("weight", "bias"))
        if not torch.equal(found[f"{_TOKENS}.value.weight"], read_out.T):
            raise ValueError(
                "transformers ties the read-out to the embedding, and the model's differ; export a tied copy"
            )
        plain = super().original(found, config)  # its decoder is inside no other
        return {_BIAS: bias} | {name.replace("decoder.decoder.", "decoder.", 1): item for name, item in plain.items()}


def _described(heads: int, *, residual: bool, queries: bool = True) -> Callable[[Mapping[str, Any]], Perceiver]:
    """What the task models say of their decoder in code, not in their configuration."""

    def describe(config: Mapping[str, Any]) -> Perceiver:
        found = transformers.describe({**config, "decoder_heads": heads, "decoder_query_residual": residual})
        return found if queries else replace(found, queries=None)

    return describe


IMAGE = ImageSource(
    model="PerceiverForImageClassificationFourier",
    recognises=f"{_TRUNK}decoder.decoder.output_position_encodings",
    describe=_described(1, residual=True),
    layer_names=transformers.layer_names,
)
LEARNED_IMAGE = LearnedImageSource(
    model="PerceiverForImageClassificationLearned",
    recognises=f"{_READ}convnet_1x1.",
    describe=_described(1, residual=True),
    layer_names=transformers.layer_names,
)
FLOW = FlowSource(
    model="PerceiverForOpticalFlow",
    recognises=f"{_READ}conv_after_patches.",
    describe=_described(1, residual=False, queries=False),
    layer_names=transformers.layer_names,
)
TEXT = TextSource(
    model="PerceiverForMaskedLM",
    recognises=_BIAS,
    describe=_described(8, residual=False),
    layer_names=transformers.layer_names,
)
TEXT_CLASSES = TextClassesSource(
    model="PerceiverForSequenceClassification",
    recognises=_EMBEDDING,
    describe=_described(1, residual=True),
    layer_names=transformers.layer_names,
)
