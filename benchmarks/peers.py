"""Other people's Perceivers, built for a `Case`. Each builder returns a module: (B, tokens, channels) -> output.

The peers are needed only to run the benchmark; one that is not installed is named with the command that installs it.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.cases import Case

INSTALL = {
    "krasserm": "pip install --no-deps --ignore-requires-python perceiver-io==0.11.0",
    "lucidrains": "pip install perceiver-pytorch==0.11.0",
    "transformers": "pip install transformers==5.23.0",
}
PACKAGES = {"krasserm": "perceiver", "lucidrains": "perceiver_pytorch", "transformers": "transformers"}


def installed(name: str) -> bool:
    return importlib.util.find_spec(PACKAGES[name]) is not None


def available(names: list[str]) -> list[str]:
    """Those that are installed; says how to install the others."""
    for name in names:
        if not installed(name):
            print(f"{name} is not installed and left out; to compare with it: {INSTALL[name]}")
    return [name for name in names if installed(name)]


def supports(name: str, case: Case) -> bool:
    """transformers has no repeated cross-attention."""
    return not (name == "transformers" and case.repeats)


def build_peer(name: str, case: Case) -> nn.Module:
    """A peer with random weights in training mode, dropout 0."""
    torch.manual_seed(0)
    return {"krasserm": _krasserm, "lucidrains": _lucidrains, "transformers": _transformers}[name](case).train()


class _Mean(nn.Module):
    """Mean over the latents of an encoder."""

    def __init__(self, encoder: nn.Module, **arguments):
        super().__init__()
        self.encoder, self.arguments = encoder, arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, **self.arguments).mean(dim=1)


def provide_fairscale() -> None:
    """perceiver-io imports it and calls it only for checkpointing: an empty one does where it is not installed."""
    if "fairscale" not in sys.modules and importlib.util.find_spec("fairscale") is None:
        stand_in = ModuleType("fairscale.nn")
        stand_in.checkpoint_wrapper = lambda module, **_: module
        sys.modules.setdefault("fairscale", ModuleType("fairscale"))
        sys.modules.setdefault("fairscale.nn", stand_in)


def _krasserm(case: Case) -> nn.Module:
    provide_fairscale()
    from perceiver.model.core.adapter import InputAdapter, OutputAdapter, TrainableQueryProvider
    from perceiver.model.core.modules import PerceiverDecoder, PerceiverEncoder, PerceiverIO

    class Identity(InputAdapter):
        def forward(self, x):
            return x

    class LinearOutput(OutputAdapter):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(case.width, case.outputs)

        def forward(self, x):
            return self.linear(x)

    encoder = PerceiverEncoder(
        Identity(case.channels),
        num_latents=case.latents,
        num_latent_channels=case.width,
        num_cross_attention_heads=case.cross_heads,
        num_cross_attention_layers=case.cross_layers,
        cross_attention_widening_factor=case.widening,
        num_self_attention_heads=case.self_heads,
        num_self_attention_layers_per_block=case.self_layers,
        num_self_attention_blocks=case.cross_layers,
        self_attention_widening_factor=case.widening,
    )
    if case.repeats:
        return _Mean(encoder)
    decoder = PerceiverDecoder(
        LinearOutput(),
        TrainableQueryProvider(case.queries, case.width),
        num_latent_channels=case.width,
        num_cross_attention_heads=case.cross_heads,
        cross_attention_widening_factor=case.widening,
        cross_attention_residual=False,
    )
    return PerceiverIO(encoder, decoder)


def _lucidrains(case: Case) -> nn.Module:
    from perceiver_pytorch import Perceiver, PerceiverIO

    shared = {
        "num_latents": case.latents,
        "latent_dim": case.width,
        "cross_heads": case.cross_heads,
        "latent_heads": case.self_heads,
        "cross_dim_head": case.width // case.cross_heads,
        "latent_dim_head": case.width // case.self_heads,
    }
    if case.repeats:
        model = Perceiver(
            num_freq_bands=0,
            max_freq=1.0,
            fourier_encode_data=False,
            input_channels=case.channels,
            input_axis=1,
            depth=case.cross_layers,
            self_per_cross_attn=case.self_layers,
            weight_tie_layers=True,
            final_classifier_head=False,
            **shared,
        )
        return _Mean(model)

    class WithQueries(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = PerceiverIO(
                depth=case.self_layers,
                dim=case.channels,
                queries_dim=case.width,
                logits_dim=case.outputs,
                decoder_ff=True,
                **shared,
            )
            # One latent block of the peer is one self-attention layer, as in the other implementations.
            self.queries = nn.Parameter(0.02 * torch.randn(case.queries, case.width))

        def forward(self, x):
            return self.model(x, queries=self.queries)

    return WithQueries()


def _transformers(case: Case) -> nn.Module:
    from transformers import PerceiverConfig, PerceiverModel
    from transformers.models.perceiver.modeling_perceiver import PerceiverBasicDecoder

    config = PerceiverConfig(
        num_latents=case.latents,
        d_latents=case.width,
        d_model=case.channels,
        num_blocks=1,
        num_self_attends_per_block=case.self_layers,
        num_self_attention_heads=case.self_heads,
        num_cross_attention_heads=case.cross_heads,
        cross_attention_shape_for_attention="q",
        self_attention_widening_factor=case.widening,
        cross_attention_widening_factor=case.widening,
        attention_probs_dropout_prob=0.0,
    )
    decoder = PerceiverBasicDecoder(
        config,
        output_num_channels=case.outputs,
        output_index_dims=case.queries,
        num_channels=case.width,
        num_heads=case.cross_heads,
        widening_factor=case.widening,
        trainable_position_encoding_kwargs={"num_channels": case.width, "index_dims": case.queries},
    )

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = PerceiverModel(config, decoder=decoder)

        def forward(self, x):
            return self.model(inputs=x).logits

    return Logits()
