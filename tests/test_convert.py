"""Weights of other projects: the rule's errors, sharing, and that their packages import beside our folders."""

import importlib.util
import json
import re
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


def healda_model(name="healda_a"):
    """Our model with the weights of a golden file, and their configuration."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz", allow_pickle=False) as stored:
        state = {key.removeprefix("state/"): stored[key] for key in stored.files if key.startswith("state/")}
        config = json.loads(str(stored["config"]))
    overrides, layout, weights = convert("physicsnemo", state, config)
    model = build(overrides, layout)
    model.load_state_dict(weights)
    return model, state, config


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


# HealDA


def test_frequencies_that_older_physicsnemo_weights_leave_out_are_filled_in():
    _, state, config = healda_model()
    frequencies = torch.from_numpy(state.pop("dit.conditioning_embedder.map_noise.freqs"))
    _, _, weights = convert("physicsnemo", state, config)
    torch.testing.assert_close(weights["condition.noise.frequencies"], frequencies)


@pytest.mark.parametrize("name", ("healda_a", "healda_condition", "healda_layernorm_affine"))
def test_training_package_names_go_both_ways(name):
    model, _, config = healda_model(name)
    state = export("healda", model, config)
    block = "transformer_blocks.0"
    published = {
        *(f"{block}.{part}.weight" for part in ("norm1.linear", "temporal_attn_norm.linear", "obs_attn_norm.linear")),
        *(f"{block}.temporal_attn.{part}.weight" for part in ("qkv", "proj")),
        *(f"{block}.obs_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *(f"{block}.ff.net.{part}.weight" for part in ("0.proj", "2")),
        "proj_out_1.weight",
    }
    assert published <= set(state)
    prefixes = ("pos_embed.", "noise_embed.", "transformer_blocks.", "proj_out_1.", "patch_decode.")
    assert all(key.startswith((*prefixes, "backbone_obs_tokenizer.")) for key in state)
    assert recognise(state) == "healda"
    overrides, layout, weights = convert("healda", state, config)
    again = build(overrides, layout)
    again.load_state_dict(weights)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    returned = export("healda", again, config)
    assert returned.keys() == state.keys() and all(torch.equal(returned[key], state[key]) for key in state)


SPELLINGS = (
    ("pos_embed.pos_embed", "pos_embed.table"),
    ("pos_embed.proj", "pos_embed.patchify.conv"),
    ("noise_embed.map_layer0", "noise_embed.mlp.0"),
    ("noise_embed.map_layer1", "noise_embed.mlp.2"),
    ("noise_embed.map_condition", "noise_embed.class_embed"),
    ("patch_decode", "patch_decode.conv_t"),
    ("embed_table", "embedder.obs_type"),
    ("channel_embedding", "embedder.channel"),
    ("platform_embedding", "embedder.platform"),
    ("cond_mlp", "embedder.net"),
    ("attn1.proj", "attn1.to_out.0"),
)


@pytest.mark.parametrize("name", ("healda_a", "healda_condition", "healda_layernorm_affine"))
def test_training_package_weights_by_other_names_are_found_by_role(name):
    model, _, config = healda_model(name)
    given = {}
    for key, tensor in export("healda", model, config).items():
        for ours, theirs in SPELLINGS:
            key = key.replace(ours, theirs)
        if found := re.fullmatch(r"(.*attn1\.)qkv\.(weight|bias)", key):
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                given[f"{found[1]}to_{part}.{found[2]}"] = piece
        else:
            given[key] = tensor[None] if key == "pos_embed.table" else tensor
    del given["noise_embed.map_noise.freqs"]
    for index in range(config["num_layers"]):
        given[f"transformer_blocks.{index}.temporal_attn.rope.freqs_cos"] = torch.zeros(2, 3)
        given[f"transformer_blocks.{index}.attn1._extra_state"] = torch.zeros(0)
    shuffled = {key: given[key] for key in sorted(given, reverse=True)}
    _, _, weights = convert("healda", shuffled, config)
    assert weights.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[key], tensor, msg=key)


def test_tables_of_2048_channels_and_strange_weights():
    model, _, config = healda_model()
    state = export("healda", model, config)
    name = "backbone_obs_tokenizer.channel_embedding.weight"
    wide = {**state, name: torch.randn(2048, state[name].shape[1])}
    overrides, layout, weights = convert("healda", wide, config)
    assert layout.observations.num_channels == 2048 and layout.observations.num_types == 1024
    build(overrides, layout).load_state_dict(weights)
    with pytest.raises(ValueError, match=r"healda weights: 'transformer_blocks\.0\.attn2\.weight' is unknown"):
        convert("healda", {**state, "transformer_blocks.0.attn2.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"'transformer_blocks\.1\.ff\.net\.2\.bias' is missing"):
        convert("healda", {key: state[key] for key in state if not key.endswith("1.ff.net.2.bias")}, config)
    with pytest.raises(ValueError, match=r"temporal_attn_legacy_scaling_bug=true .* is not supported"):
        convert("healda", state, {**config, "temporal_attn_legacy_scaling_bug": True})


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_imports_beside_our_folder_called_kernels():
    program = "from transformers import PerceiverModel; print(PerceiverModel.__name__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "PerceiverModel", done.stderr


# lucidrains


def lucidrains(version: str) -> tuple[dict, dict]:
    """(weights, config) of the golden file, by the names of a release."""
    with np.load(ROOT / "tests" / "golden" / "lucidrains_video.npz", allow_pickle=False) as stored:
        state = {name.removeprefix("state/"): stored[name] for name in stored.files if name.startswith("state/")}
        config = json.loads(str(stored["config"]))
    if version == "lucidrains":
        parts = {"0": "cross_attn", "1": "cross_ff", "2": "self_attns"}
        renamed = {}
        for name, array in state.items():
            place = name.split(".")
            if place[0] == "layers":
                place[2] = parts[place[2]]
            renamed[".".join(place)] = array
        state = renamed
    return state, config


def test_releases_with_other_names_give_the_same_weights_and_get_their_own_back():
    converted = {}
    for source in ("lucidrains", "lucidrains_0.9"):
        state, config = lucidrains(source)
        assert recognise(state) == source
        overrides, layout, weights = convert(source, state, config)
        converted[source] = overrides, weights
        model = build(overrides, layout)
        model.load_state_dict(weights)
        returned = export(source, model, config)
        assert set(returned) == set(state)
        assert all(np.array_equal(returned[name], array) for name, array in state.items())
    (overrides, weights), (others, same) = converted.values()
    assert overrides == others and all(torch.equal(weights[name], same[name]) for name in weights)


def test_channels_of_fourier_positions_are_put_in_our_order():
    state, config = lucidrains("lucidrains_0.9")
    _, _, weights = convert("lucidrains_0.9", state, config)
    given, found = state["layers.0.0.norm_context.weight"], weights["encoder.cross.0.context_norm.weight"]
    assert config["input_channels"] == 2 and config["num_freq_bands"] == 2
    # Two values, then (sine, sine, cosine, cosine, position) of time, row and column.
    theirs = [0, 1, 6, 11, 16, 2, 3, 7, 8, 12, 13, 4, 5, 9, 10, 14, 15]
    np.testing.assert_array_equal(found.numpy(), given[theirs])
    keys = state["layers.0.0.fn.to_kv.weight"][: len(state["layers.0.0.fn.to_kv.weight"]) // 2]
    np.testing.assert_array_equal(weights["encoder.cross.0.attention.key.weight"].numpy(), keys[:, theirs])


@pytest.mark.parametrize("option", ("inverted_cross_attn", "attn_residual"))
def test_what_our_model_has_not_is_refused(option):
    state, config = lucidrains("lucidrains")
    with pytest.raises(ValueError, match=f"lucidrains {option}=True is not known here"):
        convert("lucidrains", state, config | {option: True})
    with pytest.raises(ValueError, match="has no output"):
        convert("lucidrains", state, config | {"final_classifier_head": False})
