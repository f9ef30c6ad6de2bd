"""Weights of other projects: the rule's errors, sharing, and that their packages import beside our folders."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models import build
from models.convert import TARGET, convert, export, recognise, token_batch

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "num_self_attends_per_block": 2,
    "num_blocks": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 2,
    "decoder_heads": 2,
}
KRASSERM = {
    "num_cross_attention_layers": 2,
    "num_self_attention_blocks": 3,
    "num_self_attention_layers_per_block": 1,
    "num_cross_attention_heads": 2,
    "num_self_attention_heads": 2,
    "decoder_num_cross_attention_heads": 1,
}


def transformers_state():
    with np.load(ROOT / "tests" / "golden" / "perceiver_io_hf.npz", allow_pickle=False) as stored:
        return {name.removeprefix("state/"): stored[name] for name in stored.files if name.startswith("state/")}


def krasserm_state(width=8, channels=6, queries=3):
    """Random weights by krasserm's names: two cross-attentions of their own weights and one block used three times."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    def affine(prefix, size):
        return {f"{prefix}.weight": random(size), f"{prefix}.bias": random(size)}

    def linear(prefix, inputs, outputs):
        return {f"{prefix}.weight": random(outputs, inputs) / inputs**0.5, f"{prefix}.bias": random(outputs)}

    def layer(prefix, context=None):
        attention = f"{prefix}.0.module"
        state = affine(f"{attention}.q_norm" if context else f"{attention}.norm", width)
        state |= affine(f"{attention}.kv_norm", context) if context else {}
        for part, inputs in (("q", width), ("k", context or width), ("v", context or width), ("o", width)):
            state |= linear(f"{attention}.attention.{part}_proj", inputs, width)
        state |= affine(f"{prefix}.1.module.0", width) | linear(f"{prefix}.1.module.1", width, width)
        return state | linear(f"{prefix}.1.module.3", width, width)

    state = {"0.latent_provider._query": random(4, width), "1.output_query_provider._query": random(queries, width)}
    state |= layer("0.cross_attn_1", channels) | layer("0.cross_attn_n", channels) | layer("0.self_attn_1.0")
    return state | layer("1.cross_attn", width) | linear("1.output_adapter.linear", width, 2)


def test_sources_are_recognised_by_their_keys():
    assert recognise(transformers_state()) == "transformers"
    assert recognise(krasserm_state()) == "perceiver_io"
    with pytest.raises(ValueError, match=r"no known source .*'classifier.weight'.* known: transformers, perceiver_io"):
        recognise({"classifier.weight": 0})


def test_a_shared_block_is_copied_and_returns_only_while_its_copies_agree():
    state = krasserm_state()
    overrides, layout, weights = convert("perceiver_io", state, KRASSERM, num_tokens=5)
    model = build(overrides, layout)
    model.load_state_dict(weights)
    key = "0.self_attn_1.0.1.module.1.weight"  # serves the encoder's block and the processor
    returned = export("perceiver_io", model, KRASSERM)
    assert set(returned) == set(state)
    assert torch.equal(returned[key], state[key])
    with torch.no_grad():
        model.processor.layers[0].mlp.up.weight.add_(1)
    with pytest.raises(ValueError, match=r"shares '0\.self_attn_1\.0\.1\.module\.1\.weight'"):
        export("perceiver_io", model, KRASSERM)


@pytest.mark.parametrize("change", ["observed", "masked"])
def test_masked_tokens_are_not_read_and_observed_ones_are(change):
    overrides, layout, weights = convert("perceiver_io", krasserm_state(), KRASSERM, num_tokens=5)
    model = build(overrides, layout).eval()
    model.load_state_dict(weights)
    tokens, keep = torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool)
    keep[:, 3:] = False
    before = model(token_batch(layout, tokens, keep))[TARGET]
    if change == "masked":
        tokens = tokens.masked_fill(~keep[..., None], torch.nan)
        torch.testing.assert_close(model(token_batch(layout, tokens, keep))[TARGET], before, rtol=0, atol=0)
    else:
        tokens[:, 0, 0] += 1
        assert (model(token_batch(layout, tokens, keep))[TARGET] - before).abs().max() > 1e-4


def test_unknown_sources_missing_and_surplus_weights_are_one_sentence():
    state = transformers_state()
    with pytest.raises(ValueError, match="unknown source of weights 'keras'; use one of transformers"):
        convert("keras", state, CONFIG)
    with pytest.raises(ValueError, match=r"'encoder\.self_attends\.2\..*' is missing \(16 such\); give those of Perc"):
        convert("transformers", state, {**CONFIG, "num_self_attends_per_block": 3})
    with pytest.raises(ValueError, match=r"'pooler' is unknown \(1 such\)"):
        convert("transformers", {**state, "pooler": np.zeros(1)}, CONFIG)
    with pytest.raises(ValueError, match="hidden_act='quick_gelu' is not known; allowed: gelu"):
        convert("transformers", state, {**CONFIG, "hidden_act": "quick_gelu"})


def test_export_refuses_a_model_of_another_config():
    overrides, layout, _ = convert("transformers", transformers_state(), CONFIG)
    model = build(overrides, layout)
    with pytest.raises(ValueError, match="no transformers model of that config"):
        export("transformers", model, {**CONFIG, "num_self_attends_per_block": 1})


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_imports_beside_our_folder_called_kernels():
    program = "from transformers import PerceiverModel; print(PerceiverModel.__name__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "PerceiverModel", done.stderr
