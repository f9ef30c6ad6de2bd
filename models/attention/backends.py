"""Attention backends: one string chooses who computes softmax(scale * q k^T + bias) v.

Letters: B batch, h heads, n queries, m keys, d head width of queries and keys, e head width of values.

auto       the rule of `choose_backend`, per device, dtype, heads and length
reference  plain matrix products and a softmax: readable, every dtype and device, memory grows with B h n m
sdpa       torch's scaled_dot_product_attention, which picks among its own kernels
blockwise  matrix products over blocks of keys, recomputed in the backward pass: little memory, any device (calls with a
           bias or dropout go to sdpa)
flash      its flash kernel (on CUDA 16-bit only); masks and biases that it refuses go to the next best kernel
cudnn      its cuDNN kernel (CUDA, 16-bit), likewise
flex       torch's flex_attention, compiled (CUDA)
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attention.blockwise import blockwise_attention

BACKENDS = ("auto", "reference", "sdpa", "blockwise", "cudnn", "flash", "flex")

# Kernels of scaled_dot_product_attention in order of preference; later ones take what the first refuses (masks, biases
# that learn; on CPU only the plain one is left for these).
_KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}

# The rule for CPUs, measured by `python -m benchmarks attention` (docs/performance.md).
_WIDE_HEAD = 128  # the tiled kernel is slow for wider heads: those of absorbed projections
_WIDE_LOGITS = 2**22  # of a batch, as all but the next
_MANY_HEADS, _SHORT, _ROW_LOGITS, _SHORT_LOGITS = 8, 256, 2**16, 2**22  # it sets up every head of every sample anew
_LONG_16, _LOGITS_16 = 512, 2**23  # 16 bit: products are fast, so that tiles pay off later
_LARGE_LOGIT_BYTES = 2**30  # a 16-bit matrix above this costs more memory than its speed is worth


def require_backend(backend: str, device: torch.device | str) -> None:
    """Raises ValueError, one line, when this device cannot run the attention backend."""
    kind = torch.device(device).type
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; use model.attention={'|'.join(BACKENDS)}")
    if backend in ("cudnn", "flex") and kind != "cuda":
        raise ValueError(
            f"model.attention={backend} needs a CUDA device and this run uses {kind}; "
            "use model.attention=auto, sdpa, flash or reference"
        )
    if backend == "cudnn" and not torch.backends.cudnn.is_available():
        raise ValueError("model.attention=cudnn needs cuDNN, which this PyTorch lacks; use model.attention=auto")


def choose_backend(query: Tensor, num_keys: int, *, constant_keys: bool = False) -> str:
    """The rule behind `auto` for queries (B, h, n, d) and a number of keys. constant_keys: keys and values need no
    gradient.

    CUDA: sdpa. CPU: reference, sdpa, which never writes the B h n m logits, or blockwise, which neither writes them nor
    computes gradients of constant keys.
    32 and 64 bit: reference for at least 8 heads in all, of at most 256 keys, unless logits pass 2^22 (and 2^16 in a
    sample), and for at most 2^22 logits of heads wider than 128; else blockwise for wide heads and constant keys, else
    sdpa.
    16 bit: reference for at most 2^23 logits, fewer than 512 keys or wide heads, all unless logits pass 1 GiB; else
    blockwise for wide heads, constant keys and on processors without matrix tiles (AMX), where it has not been
    measured, else sdpa.
    """
    batch, heads, queries, width = query.shape
    if query.device.type != "cpu":
        return "sdpa"
    row, wide = heads * queries * num_keys, width > _WIDE_HEAD
    logits = batch * row
    if query.dtype in (torch.bfloat16, torch.float16):
        few = logits <= _LOGITS_16 or num_keys < _LONG_16 or wide
        few = few and logits * query.element_size() <= _LARGE_LOGIT_BYTES
        constant_keys = constant_keys or not torch.cpu._is_amx_tile_supported()
    elif wide:
        few = logits <= _WIDE_LOGITS
    else:
        few = batch * heads >= _MANY_HEADS and queries > 1 and num_keys <= _SHORT
        few = few and (row <= _ROW_LOGITS or logits <= _SHORT_LOGITS)
    if few:
        return "reference"
    return "blockwise" if constant_keys or wide else "sdpa"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """(B, h, n, d), (B, h, m, d), (B, h, m, e) -> (B, h, n, e).

    key_mask: (B, m) bool, True = keep; masked keys and values must be finite. Rows without any key give exact zeros and
    finite gradients. bias: broadcastable to (B, h, n, m), added to the logits. causal: queries and keys end together,
    and no query reads a key after its own, which it always reads, whatever the mask says. dropout: of the attention
    weights. Raises ValueError when the device or dtype does not suit the backend.
    """
    if backend == "auto":
        constant = query.requires_grad and not (key.requires_grad or value.requires_grad)
        backend = choose_backend(query, key.shape[2], constant_keys=constant)
    else:
        require_backend(backend, query.device)
        if backend in _KERNELS and query.is_cuda and query.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"model.attention={backend} computes in 16 bit on CUDA, got {query.dtype}; "
                "use trainer.precision=bf16 or model.attention=auto"
            )
    options = {}
    if causal and query.shape[2] == 1 and key_mask is not None:
        key_mask = torch.cat([key_mask[:, :-1], torch.ones_like(key_mask[:, -1:])], dim=1)
    elif causal and query.shape[2] > 1:
        plain = key_mask is None and bias is None and query.shape[2] == key.shape[2]
        if plain and backend in ("sdpa", *_KERNELS):
            options = {"causal": True}  # these kernels skip what lies above the diagonal
        else:
            bias, key_mask = _causal_bias(query, key.shape[2], key_mask, bias), None
    if backend == "blockwise" and (bias is not None or dropout):
        backend = "sdpa"
    any_key = None
    if key_mask is not None:
        any_key = key_mask.any(dim=1, keepdim=True)  # (B, 1)
        key_mask = key_mask | ~any_key  # no row is empty inside a kernel: softmax and its gradient stay finite
    bias = None if bias is None else bias.to(query.dtype)
    attended = _COMPUTE[backend](
        query, key, value, scale=scale, key_mask=key_mask, bias=bias, dropout=dropout, **options
    )
    return attended if any_key is None else torch.where(any_key[:, :, None, None], attended, 0.0)


def _causal_bias(query: Tensor, num_keys: int, key_mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """0 where a query may read a key and minus infinity elsewhere, added to the bias."""
    count, shift = query.shape[2], num_keys - query.shape[2]
    read = torch.ones(count, num_keys, dtype=torch.bool, device=query.device).tril(shift)
    if key_mask is not None:
        own = torch.ones_like(read).triu(shift) & read
        read = (read & key_mask[:, None] | own)[:, None]  # (B, 1, n, m)
    barred = torch.zeros(read.shape, dtype=query.dtype, device=query.device).masked_fill(~read, -torch.inf)
    return barred if bias is None else barred + bias


def _reference(query, key, value, *, scale, key_mask, bias, dropout):
    logits = (query * scale) @ key.transpose(-1, -2)  # (B, h, n, m)
    if bias is not None:
        logits = logits + bias
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return F.dropout(logits.softmax(dim=-1), dropout) @ value


def _sdpa(query, key, value, *, scale, key_mask, bias, dropout, causal=False):
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if bias is not None:
        mask = bias if mask is None else torch.where(mask, bias, -torch.inf)
    if mask is not None and mask.ndim == 4:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    # The tiled kernels take one width only; zero columns change neither logits nor values.
    width, head_width = value.shape[3], max(query.shape[3], value.shape[3])
    query, key, value = (_widened(x, head_width) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
    )
    return attended[..., :width]


def _widened(heads: Tensor, width: int) -> Tensor:
    """Zero columns added where there are fewer; `F.pad` would copy also what has enough."""
    return heads if heads.shape[3] == width else F.pad(heads, (0, width - heads.shape[3]))


def _kernel(name):
    def compute(query, key, value, **arguments):
        with sdpa_kernel(_KERNELS[name], set_priority=True):
            return _sdpa(query, key, value, **arguments)

    return compute


def _flex(query, key, value, *, scale, key_mask, bias, dropout):
    if dropout:
        raise ValueError("model.attention=flex has no attention dropout; use model.attention=auto")
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    bias = None if bias is None else bias.expand(shape)

    def score(logit, batch, head, row, column):
        if bias is not None:
            logit = logit + bias[batch, head, row, column]
        return logit if key_mask is None else torch.where(key_mask[batch, column], logit, -torch.inf)

    modifier = None if bias is None and key_mask is None else score
    return compiled_flex()(query, key, value, score_mod=modifier, scale=scale)


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _blockwise(query, key, value, *, scale, key_mask, bias, dropout):
    assert bias is None and not dropout
    return blockwise_attention(query, key, value, scale=scale, key_mask=key_mask)


_COMPUTE = {
    "reference": _reference,
    "sdpa": _sdpa,
    "blockwise": _blockwise,
    "flash": _kernel("flash"),
    "cudnn": _kernel("cudnn"),
    "flex": _flex,
}
