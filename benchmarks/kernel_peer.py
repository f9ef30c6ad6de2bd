"""PhysicsNeMo 2.2.2's kernels for `python -m benchmarks kernels`, read from its unpacked wheel or its installation.

Its packages import much more than its kernels need (warp, timm, earth2grid), so packages are stood in for by empty ones
with the same folders, and a kernel's module is imported from there. What a block takes from timm (self-attention
through `scaled_dot_product_attention`, with affine-free RMS norms) is written out here.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch.nn.functional as F
from torch import Tensor, nn

NAME = "physicsnemo"
VARIABLE = "PHYSICSNEMO_PATH"
HEALDA = "physicsnemo.experimental.models.healda"
TRANSFORMS = "physicsnemo.experimental.datapipes.healda.transforms"
TILES, WARPS, STAGES = (32, 64, 128), (1, 2, 4), (2,)  # of its 36 configurations a kernel: those worth a short run


def folder() -> Path | None:
    """Of its package: below the folder that PHYSICSNEMO_PATH names, else where it is installed."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given) / NAME if (Path(given) / NAME).is_dir() else None
    spec = importlib.util.find_spec(NAME)
    return Path(spec.submodule_search_locations[0]) if spec else None


def absent() -> str:
    """Why there is no peer; empty where there is one."""
    if folder() is None:
        return f"{NAME} 2.2.2 not found: unpack its wheel and set {VARIABLE} to the folder"
    try:
        module("attention_layers")
    except Exception as error:  # whatever another project's modules raise
        return f"{NAME} could not be imported: {type(error).__name__}: {error}"
    return ""


@cache
def module(name: str, package: str = HEALDA) -> ModuleType:
    _stand_in()
    return importlib.import_module(f"{package}.{name}")


@cache
def _stand_in() -> None:
    root = folder()
    paths = ("", ".core", ".nn", ".nn.module", ".experimental", ".experimental.models", ".experimental.models.healda")
    paths += tuple(f".experimental.datapipes{rest}" for rest in ("", ".healda", ".healda.transforms"))
    for path in paths:
        _module(NAME + path, [str(root.joinpath(*path.split(".")))])
    if importlib.util.find_spec("jaxtyping") is None:
        _module("jaxtyping", [], Float=_Annotation, Int=_Annotation, Bool=_Annotation)
    sys.modules["physicsnemo.core"].Module = _Module
    _module("physicsnemo.nn.functional", [], drop_path=lambda x, *_: x)
    _module("physicsnemo.nn.module.dit_layers", [], get_attention=_attention, get_layer_norm=_layer_norm)
    rope = importlib.import_module("physicsnemo.nn.module.rope")
    names = ("ConditioningEmbedder", "ConditioningEmbedderType", "get_conditioning_embedder")
    vars(sys.modules["physicsnemo.nn"]).update(dict.fromkeys(names))
    vars(sys.modules["physicsnemo.nn"]).update(
        RotaryEmbedding1DTables=rope.RotaryEmbedding1DTables, apply_rotary_pos_emb=rope.apply_rotary_pos_emb
    )


def _module(name: str, paths: list[str], **contents: object) -> None:
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    made.__path__ = paths
    vars(made).update(contents)
    sys.modules[name] = made


class _Annotation:
    def __class_getitem__(cls, item: object) -> type:
        return Tensor


class _Module(nn.Module):
    def __init__(self, meta: object = None):
        super().__init__()


def _layer_norm(hidden_size: int, backend: str, *, elementwise_affine: bool, eps: float) -> nn.Module:
    return nn.LayerNorm(hidden_size, elementwise_affine=elementwise_affine, eps=eps)


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attn_op = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        batch, places, width = x.shape
        heads = self.attn_op["qkv"](x).view(batch, places, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        query, key = (F.rms_norm(part, part.shape[-1:], eps=1e-6) for part in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.attn_op["proj"](mixed.transpose(1, 2).reshape(batch, places, width))


def _attention(*, hidden_size: int, num_heads: int, **_: object) -> nn.Module:
    return _Attention(hidden_size, num_heads)


# What the benchmark calls ---------------------------------------------------------------------------------------------


def tune_shortly() -> None:
    """Leaves the pixel kernels those of their configurations that a short run can measure."""
    kernels = module("kernels.pixel_attention")
    for tuner in (kernels._pixel_attn_gqa_fwd, kernels._pixel_attn_gqa_bwd):
        tuner.configs = [
            config
            for config in tuner.configs
            if config.kwargs["TILE_K"] in TILES and config.num_warps in WARPS and config.num_stages in STAGES
        ]


def packing(offsets: Tensor) -> SimpleNamespace:
    """What its attention wants to know of all cells, made once a batch."""
    context = module("obs_context")
    seqlens = offsets.int()
    return SimpleNamespace(
        cu_seqlens_k=seqlens,
        max_seqlen_k=int(offsets.diff().max()),
        group_map=context.build_pixel_group_map(seqlens) if offsets.is_cuda else None,
    )


def pixel_attention(
    query: Tensor, tokens: Tensor, weights: tuple[Tensor, Tensor, Tensor], *, kv_heads: int, scale: float, packed
) -> Tensor:
    key, value, bias = weights
    if not query.is_cuda:
        reference = module("attention_layers")._pixel_attention_reference
        result = reference(query, tokens, key, value, packed.cu_seqlens_k, kv_heads, scale, B_v=bias)
    else:
        result = module("kernels.pixel_attention").pixel_attention(
            query,
            tokens,
            key,
            value,
            packed.cu_seqlens_k,
            packed.max_seqlen_k,
            n_kv_heads=kv_heads,
            scale=scale,
            B_v=bias,
            group_map=packed.group_map,
        )
    return result.flatten(1)


def film_tokenizer(
    rows: dict[str, Tensor],
    tables: tuple[Tensor, ...],
    expand: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    project: tuple[Tensor, Tensor],
) -> Callable[[], Tensor]:
    """Features (30), then tokens, of raw rows; the parameters are the tensors given."""
    tokenizer = module("obs_tokenizer").ObsTokenizerFiLM(
        30,
        project[0].shape[0] // 2,
        obs_type_embed_dim=tables[0].shape[1],
        channel_embed_dim=tables[1].shape[1],
        platform_embed_dim=tables[2].shape[1],
        hidden_dim=len(expand[0]),
    )
    embeddings = (tokenizer.embed_table, tokenizer.channel_embedding, tokenizer.platform_embedding)
    for embedding, table in zip(embeddings, tables, strict=True):
        embedding.weight = table
    linear, layer_norm, _, last = tokenizer.cond_mlp
    for layer, (weight, bias) in zip((linear, layer_norm, last), (expand, norm, project), strict=True):
        layer.weight, layer.bias = weight, bias
    of_frame = rows["times"].flatten()[rows["frame"].long()]
    features = partial(
        module("obs_features_ext", TRANSFORMS).compute_unified_metadata,
        of_frame,
        time=(of_frame + rows["time_offset"]) * 1_000_000_000,
        lon=rows["longitude"],
        lat=rows["latitude"],
        height=rows["height"],
        pressure=rows["pressure"],
        scan_angle=rows["scan_angle"],
        sat_zenith_angle=rows["satellite_zenith"],
        sol_zenith_angle=rows["solar_zenith"],
    )
    ids = [rows[name].int() for name in ("type", "channel", "platform")]
    return lambda: tokenizer(rows["value"], features(), *ids)


def sort_and_pack(cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    context = module("obs_context")
    order, counts = context.sort_and_pack(cell, num_cells)
    return order, context.counts_to_cu_seqlens(counts)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return module("adaln").modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return module("adaln").gated_residual(x, branch, gate)


def gated_norm(x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """One after the other, as its block calls them."""
    stream = gated(x, gate, branch)
    return stream, modulated_norm(stream, shift, scale)


def head_norm(packed: Tensor) -> tuple[Tensor, ...]:
    """(..., s, h, d): queries and keys normalised as timm's attention does, heads before tokens."""
    query, key, value = (part.transpose(-3, -2) for part in packed.unbind(-3))
    query, key = (F.rms_norm(part, part.shape[-1:], eps=1e-6) for part in (query, key))
    return tuple(part.transpose(-3, -2) for part in (query, key, value))


def temporal_attention(rotation: tuple[Tensor, Tensor], *, heads: int, width: int) -> Callable[[Tensor], Tensor]:
    """Causal and linear, of fused projections (B, T, X, 3 h d): its layer with nothing before and after it."""
    layer = module("attention_layers").TemporalAttention(hidden_size=width, num_heads=heads, is_causal=True)
    layer.qkv, layer.proj, layer.hidden_size = nn.Identity(), nn.Identity(), 3 * width
    return partial(layer, rope_cos=rotation[0], rope_sin=rotation[1])


BLOCK = {
    "spatial.qkv": "attention.attn_op.qkv",
    "spatial.output": "attention.attn_op.proj",
    "norm.linear": "norm1_modulation.modulation.1",
    "observations_norm.linear": "cross_attn_modulation.modulation.1",
    "observations.query": "cross_attention.q_proj",
    "observations.key": "cross_attention.k_proj",
    "observations.value": "cross_attention.v_proj",
    "observations.output": "cross_attention.out_proj",
    "temporal_norm.linear": "temporal_attn_modulation.modulation.1",
    "temporal.qkv": "temporal_attention.qkv",
    "temporal.output": "temporal_attention.proj",
    "mlp.up": "linear.layers.0",
    "mlp.down": "linear.layers.2",
}  # our parts of a block and theirs


def their_name(name: str) -> str:
    """Of a parameter of our block."""
    part, kind = name.rsplit(".", 1)
    return f"{BLOCK[part]}.{kind}"


def block(ours: nn.Module, *, hidden: int, heads: int, condition: int, cross: dict[str, int]) -> nn.Module:
    """Its `VideoDiTBlock` with the weights of our block."""
    cross_attention = module("attention_layers").PixelCrossAttention
    theirs = module("video_dit").VideoDiTBlock(
        hidden,
        heads,
        condition_embed_dim=condition,
        temporal_attention=True,
        is_causal=True,
        cross_attention=lambda: cross_attention(hidden, use_proj_bias=True, **cross),
    )
    theirs.load_state_dict({their_name(name): value for name, value in ours.named_parameters()})
    return theirs
