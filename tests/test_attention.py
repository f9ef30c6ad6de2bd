"""Attention against a float64 reference written out head by head."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels.head_norm import NORM_EPS
from models.attention import AttentionLayer, MultiHeadAttention, attend, require_backend
from models.attention.backends import choose_backend
from models.attention.multi_head import absorbing_is_cheaper

CPU_BACKENDS = ("auto", "reference", "sdpa", "blockwise", "flash")


def slow_attention(module: MultiHeadAttention, x, context, mask=None, bias=None):
    """softmax(q k^T / sqrt(width)) v, one sample, head and query at a time, over the kept keys only."""
    heads, output = module.num_heads, torch.zeros(x.shape[0], x.shape[1], module.output.out_features, dtype=x.dtype)
    for b in range(x.shape[0]):
        keep = torch.ones(context.shape[1], dtype=torch.bool) if mask is None else mask[b]
        if not keep.any():
            continue
        tokens = context[b, keep]
        q, k, v = module.query(x[b]), module.key(tokens), module.value(tokens)
        parts = []
        for h, (qh, kh, vh) in enumerate(zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)):
            if module.qk_norm:
                qh = qh / (qh.square().mean(1, keepdim=True) + NORM_EPS).sqrt()
                kh = kh / (kh.square().mean(1, keepdim=True) + NORM_EPS).sqrt()
            logits = qh @ kh.T / kh.shape[1] ** 0.5
            if bias is not None:
                logits = logits + bias[b, h][:, keep]
            parts.append(logits.softmax(1) @ vh)
        output[b] = module.output(torch.cat(parts, 1))
    return output


def parts(module, x, context):
    return [x.grad, context.grad, *[parameter.grad for parameter in module.parameters()]]


def random_case(*, masked: bool, qk_norm: bool = False, **arguments):
    torch.manual_seed(0)
    module = MultiHeadAttention(
        12, 10, num_heads=2, qk_width=8, v_width=6, output_dim=5, qk_norm=qk_norm, **arguments
    ).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, context = torch.randn(3, 4, 12, dtype=torch.float64), torch.randn(3, 7, 10, dtype=torch.float64)
    mask = None
    if masked:
        mask = torch.rand(3, 7) > 0.4
        mask[0, 0], mask[1] = True, False
    return module, x, context, mask


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kv_mode", ("project", "absorb"))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("biased", (False, True))
def test_outputs_and_gradients_equal_the_slow_reference(backend, kv_mode, masked, biased):
    module, x, context, mask = random_case(masked=masked, backend=backend, kv_mode=kv_mode)
    bias = torch.randn(3, 2, 4, 7, dtype=torch.float64, requires_grad=True) if biased else None
    weights = torch.randn(3, 4, 5, dtype=torch.float64)
    x.requires_grad_(), context.requires_grad_()
    expected = slow_attention(module, x, context, mask, bias)
    (expected * weights).sum().backward()
    expected_gradients = [None if g is None else g.clone() for g in parts(module, x, context)]
    module.zero_grad(), setattr(x, "grad", None), setattr(context, "grad", None)

    poisoned = context.detach().clone()
    if masked:
        poisoned[~mask] = torch.nan
    poisoned.requires_grad_()
    output = module(x, poisoned, mask=mask, bias=bias)
    (output * weights).sum().backward()

    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for name, given, wanted in zip(
        ["x", "context", *dict(module.named_parameters())], parts(module, x, poisoned), expected_gradients, strict=True
    ):
        if (
            name == "key.bias"
        ):  # adds a constant to a row of logits: its true gradient is zero, absorption leaves it out
            assert given is None or given.abs().max() < 1e-12
            continue
        torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_row_without_keys_gives_exact_zeros(backend):
    module, x, context, mask = random_case(masked=True, backend=backend)
    assert (module(x, context, mask=mask)[1] == 0).all()


def test_query_key_norm_equals_the_slow_reference():
    module, x, context, mask = random_case(masked=True, qk_norm=True)
    torch.testing.assert_close(module(x, context, mask=mask), slow_attention(module, x, context, mask))


def test_prepared_context_is_computed_once_and_equal(monkeypatch):
    layer = AttentionLayer(12, 10, num_heads=2, kv_mode="project").double()
    x, context = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 7, 10, dtype=torch.float64)
    calls = []
    prepare = layer.attention.prepare
    monkeypatch.setattr(layer.attention, "prepare", lambda *given, **named: calls.append(1) or prepare(*given, **named))
    prepared = layer.prepare(context, num_queries=4)
    for _ in range(2):
        reused = layer(x, prepared)
    assert len(calls) == 1
    torch.testing.assert_close(reused, layer(x, context))


def test_the_absorption_rule_is_the_cheaper_of_the_two():
    case = dict(queries=256, tokens=50_176, context_dim=261, qk_width=256, v_width=256)
    assert absorbing_is_cheaper(heads=1, **case)
    assert not absorbing_is_cheaper(heads=8, **case)
    for heads, n, c, d in itertools.product((1, 2, 4), (4, 64, 512), (16, 300), (32, 256)):
        cheaper = absorbing_is_cheaper(heads=heads, queries=n, tokens=10**9, context_dim=c, qk_width=d, v_width=d)
        assert cheaper == (heads * n * c < d * (c + n))


TILED = "sdpa" if torch.cpu._is_amx_tile_supported() else "blockwise"  # in 16 bit


@pytest.mark.parametrize(
    ("shape", "keys", "constant", "wide", "narrow"),  # picks in 32 and 16 bit
    [
        ((1, 4, 64, 32), 64, False, "sdpa", "reference"),
        ((1, 16, 256, 64), 256, False, "reference", "reference"),
        ((200, 4, 16, 16), 25, False, "reference", "reference"),
        ((2000, 4, 1, 32), 9, False, "sdpa", "reference"),
        ((4, 8, 4096, 32), 128, False, "sdpa", "reference"),
        ((1, 16, 512, 64), 512, False, "sdpa", "reference"),
        ((1, 8, 256, 32), 50_000, False, "sdpa", TILED),
        ((1, 8, 256, 32), 50_000, True, "blockwise", "blockwise"),
        ((1, 1, 256, 261), 4096, True, "reference", "reference"),
        ((1, 1, 256, 261), 50_000, False, "blockwise", "reference"),
        ((1, 1, 256, 261), 5_000_000, False, "blockwise", "blockwise"),
    ],
)
def test_auto_chooses_by_dtype_heads_and_length(shape, keys, constant, wide, narrow):
    query = torch.empty(shape)
    assert choose_backend(query, keys, constant_keys=constant) == wide
    assert choose_backend(query.double(), keys, constant_keys=constant) == wide
    assert choose_backend(query.bfloat16(), keys, constant_keys=constant) == narrow
    assert choose_backend(query.to("meta"), keys) == "sdpa"


def test_blockwise_attention_over_several_blocks_equals_the_reference(monkeypatch):
    monkeypatch.setattr("models.attention.blockwise._BLOCK_LOGITS", 1)  # the smallest block, 64 keys
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(2, 3, 150, 8, dtype=torch.float64)
    value, mask = torch.randn(2, 3, 150, 6, dtype=torch.float64), torch.rand(2, 150) > 0.5
    mask[0, :70] = False  # a first block without any key
    results = []
    for backend in ("reference", "blockwise"):
        given = [tensor.clone().requires_grad_() for tensor in (query, 9 * key, value)]
        output = attend(*given, scale=0.4, key_mask=mask, backend=backend)
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output))
        results.append([output, *(tensor.grad for tensor in given)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ("cudnn", "flex", "nope"))
def test_backends_that_the_device_lacks_are_one_clear_line(backend):
    with pytest.raises(ValueError, match=r"model\.attention=") as error:
        require_backend(backend, "cpu")
    assert "\n" not in str(error.value)
    tensor = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"model\.attention="):
        attend(tensor, tensor, tensor, scale=1.0, backend=backend)


def test_widths_must_be_divisible_by_the_heads():
    with pytest.raises(ValueError, match="not divisible by 3 heads"):
        MultiHeadAttention(8, num_heads=3)


def test_self_attention_layer_never_reads_masked_tokens():
    layer = AttentionLayer(8, num_heads=2, mlp_ratio=2.0, mlp="geglu").double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, True], [True] * 5])
    poisoned = torch.where(mask[..., None], x, torch.nan).requires_grad_()
    output = layer(poisoned, mask=mask)
    output[mask].square().sum().backward()
    expected = layer(x[:1, [0, 1, 3, 4]])
    torch.testing.assert_close(output[:1, [0, 1, 3, 4]], expected)
    assert torch.isfinite(poisoned.grad).all()


def test_layer_equals_its_formula_without_residual():
    layer = AttentionLayer(8, 6, num_heads=2, residual=False).double()
    x, context = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    y = slow_attention(layer.attention, layer.query_norm(x), layer.context_norm(context))
    hidden = torch.nn.functional.gelu(layer.mlp.up(layer.mlp_norm(y)))
    torch.testing.assert_close(layer(x, context), y + layer.mlp.down(hidden))


def test_drop_path_skips_whole_samples_and_only_in_training():
    torch.manual_seed(0)
    layer = AttentionLayer(8, num_heads=2, drop_path=0.5)
    x = torch.randn(1, 3, 8).expand(64, 3, 8)
    out = layer(x)
    unchanged = (out == x).all(dim=(1, 2)).float().mean()
    assert 0.05 < unchanged < 0.6  # a quarter skips both branches
    layer.eval()
    torch.testing.assert_close(layer(x)[0], layer(x)[63])
