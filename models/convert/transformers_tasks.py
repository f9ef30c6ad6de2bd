"""transformers: `PerceiverForImageClassificationFourier` and `PerceiverForMaskedLM` (names and defaults of 5.23).

The same Perceiver IO as `transformers.py`, with what its task puts before and after it: pixels with Fourier positions,
or tokens of a vocabulary with learned ones, whose embedding also scores the outputs. Tokens come one-hot here, so that
their embedding is a linear layer (`token_batch` of `torch.nn.functional.one_hot`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.layout import Layout
from models.convert import transformers
from models.convert.perceiver import INPUT, TARGET, PerceiverSource, token_layout

_TRUNK = "perceiver."
_EMBEDDING = f"{_TRUNK}input_preprocessor.embeddings.weight"
_PLACES = f"{_TRUNK}input_preprocessor.position_embeddings.weight"
_BIAS = "embedding_decoder.bias"
_PIXELS, _BANDS, _MAX_FREQUENCY = 3, 64, 112  # of 224 rows and columns, whatever the image has


@dataclass(frozen=True)
class ImageSource(PerceiverSource):
    """Pixels and Fourier positions in, logits of classes out."""

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = super().canonical(state, config)
        return {
            name.removeprefix(_TRUNK).replace("decoder.decoder.", "decoder.", 1): tensor
            for name, tensor in tensors.items()
        }

    def original(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse of `canonical`."""
        return {f"{_TRUNK}{'decoder.' * name.startswith('decoder.')}{name}": item for name, item in tensors.items()}

    def overrides(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
        given = ["positions=fourier", f"num_bands={_BANDS}", f"max_frequency={_MAX_FREQUENCY}"]
        return [*super().overrides(config, weights), *(f"model.encoder.{item}" for item in given)]

    def layout(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], num_tokens: int | tuple) -> Layout:
        """num_tokens: rows and columns; one number stands for both."""
        axes = (num_tokens, num_tokens) if isinstance(num_tokens, int) else num_tokens
        outputs = weights[f"decoder.{TARGET}.head.weight"].shape[0]
        return token_layout(channels=_PIXELS, num_tokens=axes, outputs=outputs, queries=1)


@dataclass(frozen=True)
class TextSource(PerceiverSource):
    """One-hot tokens in, scores of the vocabulary out, with tied embeddings."""

    def names(self, config: Mapping[str, Any]) -> dict[str, str]:
        tokens = f"encoder.inputs.{INPUT}"
        own = {f"{tokens}.{name}": f"{tokens}.{name}" for name in ("value.weight", "value.bias", "table")}
        return super().names(config) | own

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors, tokens = super().canonical(state, config), f"encoder.inputs.{INPUT}"
        found = {name.removeprefix(_TRUNK): tensor for name, tensor in tensors.items()}
        embedding = found.pop(_EMBEDDING.removeprefix(_TRUNK))
        found[f"{tokens}.table"] = found.pop(_PLACES.removeprefix(_TRUNK))[None]
        found[f"{tokens}.value.weight"] = embedding.T
        found[f"{tokens}.value.bias"] = embedding.new_zeros(embedding.shape[1])
        found["decoder.final_layer.weight"] = embedding
        found["decoder.final_layer.bias"] = found.pop(_BIAS)
        return found

    def original(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse of `canonical`. Raises ValueError where embedding and read-out have been trained apart."""
        found, tokens = dict(tensors), f"encoder.inputs.{INPUT}"
        embedding = found.pop("decoder.final_layer.weight")
        if found.pop(f"{tokens}.value.bias").any() or not torch.equal(found.pop(f"{tokens}.value.weight"), embedding.T):
            raise ValueError(
                "transformers ties the read-out to the embedding, and the model's differ; export a tied copy"
            )
        plain = {_PLACES: found.pop(f"{tokens}.table")[0], _BIAS: found.pop("decoder.final_layer.bias")}
        return {_EMBEDDING: embedding, **plain, **{_TRUNK + name: tensor for name, tensor in found.items()}}

    def overrides(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
        width = weights[f"encoder.inputs.{INPUT}.value.weight"].shape[0]
        given = ["model.encoder.positions=learned", f"model.encoder.value_size={width}"]
        return [*super().overrides(config, weights), *given]

    def layout(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], num_tokens: int | tuple) -> Layout:
        """The length is that of the learned positions, whatever num_tokens says."""
        _, length, _ = weights[f"encoder.inputs.{INPUT}.table"].shape
        vocabulary, queries = (
            weights[f"decoder.{TARGET}.head.weight"].shape[0],
            weights[f"decoder.{TARGET}.table"].shape[0],
        )
        return token_layout(channels=vocabulary, num_tokens=length, outputs=vocabulary, queries=queries)


IMAGE = ImageSource(
    model="PerceiverForImageClassificationFourier",
    recognises=f"{_TRUNK}decoder.decoder.output_position_encodings",
    describe=lambda config: transformers.describe({**config, "decoder_heads": 1, "decoder_query_residual": True}),
    layer_names=transformers.layer_names,
)
TEXT = TextSource(
    model="PerceiverForMaskedLM",
    recognises=_BIAS,
    describe=lambda config: transformers.describe({**config, "decoder_heads": 8, "decoder_query_residual": False}),
    layer_names=transformers.layer_names,
)
