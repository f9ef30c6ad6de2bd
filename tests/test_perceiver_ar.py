"""Perceiver AR: what a token may read, what dropping the prefix costs, and whose weights the decoder has."""

import copy
from dataclasses import replace

import pytest
import torch

from data.batch import Batch
from data.layout import Layout, SequenceLayout
from data.sequence import Sequence, check
from models import build
from models.attention.backends import attend
from models.positions.rotary import TokenRotary, rotate_pairs
from tests.model_examples import token_batch, token_layout

SMALL = [
    "model=perceiver_ar",
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=2",
    "model.num_heads=2",
    "model.dropout=0",
]
LAYOUT = token_layout(length=14, latents=5, vocab_size=9)


def model_of(*overrides: str, layout: Layout = LAYOUT):
    """In float64, with weights so large that every path shows."""
    torch.manual_seed(0)
    model = build([*SMALL, *overrides], layout).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def batch_of(tokens: torch.Tensor, prefix_len: int, valid: torch.Tensor | None = None) -> Batch:
    wanted = Sequence(torch.zeros_like(tokens[:, prefix_len:]))
    return Batch({"tokens": Sequence(tokens, valid, prefix_len)}, {"tokens": wanted}, LAYOUT)


# What a token reads


@pytest.mark.parametrize("processor", ["perceiver_ar", "identity"])
def test_logits_do_not_depend_on_later_tokens_and_do_on_earlier_ones(processor):
    model, batch = model_of(f"model/processor={processor}").eval(), token_batch(LAYOUT)
    tokens, prefix = batch.inputs["tokens"].tokens, batch.inputs["tokens"].prefix_len
    logits = model(batch)["tokens"]
    for place in (0, prefix - 1, prefix, prefix + 2, 13):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 9
        changed = (model(batch_of(other, prefix))["tokens"] - logits).abs().amax(dim=(0, 2)) > 1e-9
        first = max(place - prefix, 0)
        assert not changed[:first].any()
        if processor == "perceiver_ar":
            assert changed[first:].all()


def test_the_prefix_and_the_latents_have_norms_of_their_own():
    model, batch = model_of().eval(), token_batch(LAYOUT)
    model(batch)["tokens"].square().sum().backward()
    assert model.processor.cross.context_norm.weight.grad.any()
    with torch.no_grad():
        model.processor.cross.context_norm.weight.zero_()
    no_prefix = batch_of(batch.inputs["tokens"].tokens[:, 9:], 0)
    before = model(no_prefix)["tokens"]
    with torch.no_grad():
        model.processor.cross.context_norm.weight.fill_(3.0)
    torch.testing.assert_close(model(no_prefix)["tokens"], before)


@pytest.mark.parametrize("positions", ["true", "false"])
def test_a_padded_row_is_the_row_alone_whatever_the_padding_holds(positions):
    model = model_of(f"model.encoder.learned_positions={positions}").eval()
    tokens = torch.randint(9, (2, 13))
    valid = torch.arange(13) >= torch.tensor([[0], [5]])
    batch = batch_of(torch.where(valid, tokens, 10_000), 8, valid)
    logits = model(batch)["tokens"]
    torch.testing.assert_close(logits[:1], model(batch_of(tokens[:1], 8))["tokens"])
    torch.testing.assert_close(logits[1:], model(batch_of(tokens[1:, 5:], 3))["tokens"])


def test_without_learned_positions_only_distances_count():
    model = model_of("model.encoder.learned_positions=false", "model.processor.rotary_share=1").eval()
    tokens = torch.randint(9, (1, 11))
    embedded = model.encoder.embed(tokens, torch.arange(11)[None])
    near, far = (
        model.processor.read_tokens(embedded, torch.arange(11)[None] + start, prefix_len=7) for start in (0, 3)
    )
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)  # angles are float32
    reversed_positions = model.processor.read_tokens(embedded, torch.arange(11).flip(0)[None], prefix_len=7)
    assert (reversed_positions - near).abs().max() > 1e-3


@pytest.mark.parametrize(("given", "turned"), [(0, 0), (1, 1), ("null", 2)])
def test_rotary_layers(given, turned):
    model = model_of(f"model.processor.rotary_layers={given}")
    rotations = []
    for layer in model.processor.layers:
        layer.register_forward_pre_hook(
            lambda _, __, options: rotations.append(options["rotations"] is not None), with_kwargs=True
        )
    model(token_batch(LAYOUT))
    assert rotations == [True] * turned + [False] * (2 - turned)


def test_rotation_turns_adjacent_pairs_of_the_first_channels():
    torch.manual_seed(0)
    heads, positions = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.tensor([[0, 1, 2, 5, 9]])
    rotary = TokenRotary(4)
    turned = rotate_pairs(heads, *rotary.angles(positions))
    pairs = torch.view_as_complex(heads[..., :4].reshape(2, 3, 5, 2, 2).contiguous())
    angles = positions[0, :, None] * torch.tensor([1.0, 10_000**-0.5])
    wanted = torch.view_as_real(pairs * torch.polar(torch.ones(5, 2), angles)).flatten(-2)
    torch.testing.assert_close(turned[..., :4], wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(turned[..., 4:], heads[..., 4:])
    assert rotary.to(torch.bfloat16).rates.dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash", "blockwise", "auto"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_causal_attention_under_every_backend(backend, masked, count):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (count, 7, 7))
    mask = torch.arange(7) >= torch.tensor([[0], [4]]) if masked else None
    attended = attend(query, key, value, scale=0.3, key_mask=mask, causal=True, backend=backend)
    wanted = torch.zeros_like(attended)
    for row in range(2):
        for place in range(count):
            own = 7 - count + place
            read = [k for k in range(own + 1) if mask is None or mask[row, k] or k == own]
            weights = (query[row, :, place, None] * 0.3 * key[row][:, read]).sum(-1).softmax(-1)
            wanted[row, :, place] = (weights[..., None] * value[row][:, read]).sum(1)
    torch.testing.assert_close(attended, wanted)
    gradients = torch.autograd.grad(attended.square().sum(), (query, key, value))
    expected = torch.autograd.grad(wanted.square().sum(), (query, key, value))
    torch.testing.assert_close(gradients, expected)


# Prefix dropout


def test_dropping_the_prefix_shortens_what_is_read_in_training_only():
    model, lengths = model_of("model.processor.prefix_dropout=0.7"), []
    model.processor.cross.attention.key.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    batch = token_batch(LAYOUT)  # 9 tokens of prefix, 5 latents
    model.train()(batch)
    model.eval()(batch)
    assert lengths == [3 + 5, 9 + 5]  # int(9 * 0.7) = 6 of 9 are dropped


def test_what_is_left_of_the_prefix_keeps_its_order_its_positions_and_its_padding():
    model = model_of("model.processor.prefix_dropout=0.5").train()
    tokens = torch.randint(9, (3, 14))
    valid = torch.arange(14) >= torch.tensor([[0], [2], [6]])
    torch.manual_seed(5)
    logits = model(batch_of(tokens, 9, valid))["tokens"]
    torch.manual_seed(5)
    kept = model.processor._kept(3, 9, torch.device("cpu"))
    assert kept.shape == (3, 5) and (kept.diff(dim=1) > 0).all() and not torch.equal(kept[0], kept[1])
    places = torch.cat([kept, torch.arange(9, 14).expand(3, -1)], dim=1)
    positions = Sequence(tokens, valid, 9).positions
    for row in range(3):
        row_valid = valid[row, places[row]]
        chosen = places[row][row_valid]
        embedded = model.encoder.embed(tokens[row : row + 1, chosen], positions[row : row + 1, chosen])
        short = model.eval().processor.read_tokens(
            embedded, positions[row : row + 1, chosen], prefix_len=int(row_valid[:5].sum())
        )
        (decoder,) = model.decoder.values()
        torch.testing.assert_close(logits[row : row + 1], decoder.logits(short))


# Tied weights


def test_the_decoder_has_the_weights_of_the_encoder_also_in_a_copy():
    model = model_of().eval()
    assert sum(parameter.shape == (9, 16) for parameter in model.parameters()) == 1
    assert sum(tensor.shape == (9, 16) for tensor in model.state_dict().values()) == 1
    twin, batch = copy.deepcopy(model), token_batch(LAYOUT)
    before = model(batch)["tokens"]
    with torch.no_grad():
        twin.encoder.embedding.weight.mul_(2)
    assert torch.equal(model(batch)["tokens"], before)
    (decoder,) = twin.decoder.values()
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    torch.testing.assert_close(
        decoder.logits(x), decoder.norm(x) @ twin.encoder.embedding.weight.T + decoder.bias, rtol=1e-12, atol=1e-12
    )


def test_without_norm_and_bias_logits_are_products_with_the_embedding():
    model = model_of("model.decoder.output_norm=false", "model.decoder.bias=false").eval()
    assert not [name for name in model.state_dict() if name.startswith("decoder.")]
    (decoder,), x = model.decoder.values(), torch.randn(1, 2, 16, dtype=torch.float64)
    torch.testing.assert_close(decoder.logits(x), x @ model.encoder.embedding.weight.T)


# Errors


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prefix_len": 4}, "prefix_len=4 leaves none of the 4 tokens to predict from; use 0 to 3"),
        ({"prefix_len": -1}, "prefix_len=-1 leaves none"),
        ({"tokens": torch.zeros(1, 4)}, "needs int64 tokens of shape (B, n), got torch.float32"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "needs int64 tokens of shape (B, n)"),
        ({"valid": torch.ones(1, 4)}, "valid must be bool of shape (1, 4)"),
    ],
)
def test_sequences_that_cannot_be_are_one_sentence(arguments, sentence):
    with pytest.raises(ValueError) as error:
        Sequence(**{"tokens": torch.zeros(1, 4, dtype=torch.int64), **arguments})
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": torch.tensor([[0, 1, 2, 9]])}, "token 9 is outside the vocabulary; allowed: 0 to 8"),
        ({"tokens": torch.tensor([[0, -2, 2, 1]])}, "token -2 is outside the vocabulary"),
        ({"tokens": torch.zeros(1, 6, dtype=torch.int64)}, "a sequence of 6 tokens is longer than the 5 of the model"),
        ({"valid": torch.tensor([[True, False, True, True]])}, "padded on the left only"),
        ({"valid": torch.tensor([[False, False, False, True]])}, "padding must end within prefix_len=2"),
    ],
)
def test_sequences_that_a_model_cannot_read_are_one_sentence(changes, sentence):
    given = replace(Sequence(torch.zeros(1, 4, dtype=torch.int64), prefix_len=2), **changes)
    with pytest.raises(ValueError) as error:
        check(given, SequenceLayout(9, 5))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_options_that_make_no_sense_are_one_sentence():
    with pytest.raises(ValueError, match=r"rotary_share=1\.3 turns 10 of the 8"):
        build([*SMALL, "model.processor.rotary_share=1.3"], LAYOUT)
    with pytest.raises(ValueError, match=r"task\.loss=mse is unknown for task\.head=token"):
        build([*SMALL, "task.loss=mse"], LAYOUT)
    with pytest.raises(ValueError, match=r"task\.head=deterministic does not predict tokens; leave task\.head out"):
        build([*SMALL, "task.head=deterministic", "task.loss=mse"], LAYOUT)


def test_a_layout_of_tokens_survives_json():
    assert Layout.from_dict(LAYOUT.to_dict()) == LAYOUT
    other = token_layout(length=14, latents=5, vocab_size=8)
    with pytest.raises(ValueError, match="up to 14 tokens of a vocabulary of 9"):
        model_of()(token_batch(other))
