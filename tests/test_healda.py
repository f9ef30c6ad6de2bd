"""HealDA v2 as a whole: precision of its tables, autocast, and the published parameters and shapes."""

from __future__ import annotations

import torch

from data.datasets.ufs_era5 import UfsEra5
from models.composition import build_from_config, compose
from models.convert import SOURCES
from tests.model_examples import observed_layout, tiny_batch

TINY = ["model=healda_v2", "model/size=tiny", "model.hidden_size=16", "model.depth=1", "model.num_heads=2"]


def test_tables_of_time_keep_their_precision_in_bfloat16_models():
    layout = observed_layout()
    model = build_from_config(compose(TINY), layout).eval()
    batch = tiny_batch(layout)
    clock = batch.observations.second_of_day, batch.observations.day_of_year
    expected = {name: buffer.clone() for name, buffer in model.named_buffers()}
    calendar = model.encoder.calendar(*clock)
    model.bfloat16()
    assert model.encoder.embed.weight.dtype == torch.bfloat16
    tables = ("calendar", "rotary", "noise")
    kept = [name for name in expected if any(f".{table}." in name for table in tables)]
    assert {table for table in tables for name in kept if f".{table}." in name} == set(tables)
    for name in kept:
        assert torch.equal(model.get_buffer(name), expected[name]), f"{name} was rounded"
    assert torch.equal(model.encoder.calendar(*clock), calendar)
    assert model.float().encoder.embed.weight.dtype == torch.float32


def test_autocast_runs_and_differs_by_rounding_only():
    torch.manual_seed(0)
    layout = observed_layout()
    model = build_from_config(compose(TINY), layout).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    batch = tiny_batch(layout)
    expected = model(batch)["forecast"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(batch)["forecast"]
    mixed.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (mixed - expected).abs().max() < 0.05 * expected.abs().max()


def published_shapes() -> dict[str, tuple[int, ...]]:
    """State dict of the published model: hidden 1536, 32 layers, patches of 2 x 2, condition 128, tokens 32."""
    c, dc, attention = 1536, 128, 64 * 32

    def linear(name, outputs, inputs, bias=True):
        return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}

    shapes = {
        **{
            f"obs_tokenizer.{name}.weight": (1024, width)
            for name, width in (("embed_table", 4), ("channel_embedding", 16), ("platform_embedding", 8))
        },
        **linear("obs_tokenizer.cond_mlp.0", 64, 50 + 4 + 16 + 8),
        "obs_tokenizer.cond_mlp.1.weight": (64,),
        "obs_tokenizer.cond_mlp.1.bias": (64,),
        **linear("obs_tokenizer.cond_mlp.3", 64, 64),
        "dit.tokenizer.pos_embed": (12288, c),
        "dit.tokenizer.conv.weight": (c, 2, 2, 2),
        "dit.tokenizer.conv.bias": (c,),
        **linear("dit.detokenizer.adaptive_modulation.1", 2 * c, dc),
        "dit.detokenizer.conv_t.weight": (c, 74, 2, 2),
        "dit.detokenizer.conv_t.bias": (74,),
        "dit.conditioning_embedder.map_noise.freqs": (64,),
        **linear("dit.conditioning_embedder.map_layer0", dc, 128),
        **linear("dit.conditioning_embedder.map_layer1", dc, dc),
    }
    for i in range(32):
        block = f"dit.blocks.{i}"
        shapes |= linear(f"{block}.attention.attn_op.qkv", 3 * c, c) | linear(f"{block}.attention.attn_op.proj", c, c)
        shapes |= linear(f"{block}.norm1_modulation.modulation.1", 6 * c, dc)
        shapes |= linear(f"{block}.linear.layers.0", 4 * c, c) | linear(f"{block}.linear.layers.2", c, 4 * c)
        shapes |= linear(f"{block}.temporal_attention.qkv", 3 * c, c)
        shapes |= linear(f"{block}.temporal_attention.proj", c, c)
        shapes |= linear(f"{block}.cross_attention.q_proj", attention, c)
        shapes |= linear(f"{block}.cross_attention.k_proj", 64, 32, bias=False)
        shapes |= linear(f"{block}.cross_attention.v_proj", 64, 32)
        shapes |= linear(f"{block}.cross_attention.out_proj", c, attention)
        for name in ("temporal_attn", "cross_attn"):
            shapes |= linear(f"{block}.{name}_modulation.modulation.1", 3 * c, dc)
    return shapes


def test_the_production_size_is_the_published_model():
    config = compose(["model=healda_v2", "model/size=production", "data=ufs_era5"])
    layout = UfsEra5(split={}).layout(frames=8)
    with torch.device("meta"):
        model = build_from_config(config, layout)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_506_070_474
    names = SOURCES["physicsnemo"].names({})
    found = {names[name]: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == published_shapes()
