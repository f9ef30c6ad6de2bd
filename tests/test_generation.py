"""Sequences that go on: the cache changes no logits, inside the window of latents and past it; how tokens are drawn."""

import pytest
import torch

from data.batch import Batch
from data.sequence import Sequence
from models import build
from models.generation import Sampling, TokenStream, generate
from tests.model_examples import tiny_layout, token_layout

LENGTH, LATENTS, VOCABULARY = 14, 5, 9
LAYOUT = token_layout(length=LENGTH, latents=LATENTS, vocab_size=VOCABULARY)
SMALL = [
    "model=perceiver_ar",
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=2",
    "model.num_heads=2",
]


@pytest.fixture(scope="module", params=["perceiver_ar", "identity"])
def model(request):
    torch.manual_seed(0)
    model = build([*SMALL, f"model/processor={request.param}"], LAYOUT).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def last_logits(model, tokens: torch.Tensor, prefix_len: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Of the model itself, as in training."""
    target = Sequence(torch.zeros_like(tokens[:, prefix_len:]))
    batch = Batch({"tokens": Sequence(tokens, valid, prefix_len)}, {"tokens": target}, LAYOUT)
    with torch.no_grad():
        return model(batch)["tokens"][:, -1]


def window(count: int, prompt: int, prefix_len: int, stride: int) -> tuple[int, int]:
    """(first token, prefix) that are read of `count` tokens: counted up from the prompt, one token at a time."""
    start, latents = 0, prompt - prefix_len
    for read in range(prompt + 1, count + 1):
        latents += 1
        if latents > LATENTS:
            latents -= stride
            start = max(start, read - latents - (LENGTH - LATENTS))
    return start, count - start - latents


@pytest.mark.parametrize("stride", [1, 2, 5, None])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("prompt", "prefix_len"), [(7, 6), (3, 0), (12, 9)])
def test_logits_are_those_of_the_model_inside_the_window_and_past_it(model, stride, cached, prompt, prefix_len):
    tokens = torch.randint(VOCABULARY, (2, 26))
    with torch.inference_mode():
        stream = TokenStream(model, Sequence(tokens[:, :prompt], None, prefix_len), stride=stride, cached=cached)
        for count in range(prompt, 26):
            start, prefix = window(count, prompt, prefix_len, stride or 2)
            wanted = last_logits(model, tokens[:, start:count], prefix)
            torch.testing.assert_close(stream.logits, wanted, rtol=1e-10, atol=1e-10)
            stream.append(tokens[:, count])
    assert start > 0 and prefix == LENGTH - LATENTS  # the oldest tokens are gone


@pytest.mark.parametrize("cached", [True, False])
def test_padded_prompts_go_on_like_those_rows_alone(model, cached):
    """Until the oldest tokens go, and after that: padding goes first."""
    tokens = torch.randint(VOCABULARY, (2, 24))
    valid = torch.arange(24) >= torch.tensor([[0], [4]])
    padded = torch.where(valid, tokens, -7)
    with torch.inference_mode():
        stream = TokenStream(model, Sequence(padded[:, :8], valid[:, :8], 7), stride=2, cached=cached)
        for count in range(8, 24):
            start, prefix = window(count, 8, 7, 2)
            for row, pad in ((0, 0), (1, max(0, 4 - start))):
                wanted = last_logits(model, tokens[row : row + 1, start + pad : count], prefix - pad)
                torch.testing.assert_close(stream.logits[row : row + 1], wanted, rtol=1e-10, atol=1e-10)
            stream.append(padded[:, count])


def test_one_more_token_is_one_query_and_copies_no_keys():
    model, read = build(SMALL, LAYOUT).eval(), []
    for layer in (model.processor.cross, *model.processor.layers):
        layer.mlp_norm.register_forward_pre_hook(lambda _, given: read.append(tuple(given[0].shape)))
        layer.attention.key.register_forward_pre_hook(lambda _, given: read.append(tuple(given[0].shape)))
    with torch.inference_mode():
        stream = TokenStream(model, Sequence(torch.zeros(1, 8, dtype=torch.int64), prefix_len=7))
        assert read == [(1, 8, 16), (1, 1, 16), *[(1, 1, 16)] * 4]
        caches = [part.cache for part in (stream.reader.cross, *stream.reader.layers)]
        places = [tensor.data_ptr() for cache in caches for tensor in (cache.keys, cache.values)]
        read.clear()
        for _ in range(LATENTS - 1):
            stream.append(torch.zeros(1, dtype=torch.int64))
        assert set(read) == {(1, 16)} and [cache.length for cache in caches] == [12, 5, 5]
        read.clear()
        stream.append(torch.zeros(1, dtype=torch.int64))  # the window is full: half of it is read anew
        assert read == [(1, 13, 16), (1, 4, 16), *[(1, 4, 16)] * 4] and [cache.length for cache in caches] == [13, 4, 4]
        assert places == [tensor.data_ptr() for cache in caches for tensor in (cache.keys, cache.values)]


@pytest.mark.parametrize(
    "options", [["model.mlp=geglu"], ["model.processor.rotary_layers=null"], ["model.decoder.bias=false"]]
)
def test_other_layers_go_on_as_they_are(options):
    torch.manual_seed(1)
    model = build([*SMALL, *options], LAYOUT).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    tokens = torch.randint(VOCABULARY, (2, 12))
    with torch.inference_mode():
        stream = TokenStream(model, Sequence(tokens[:, :8], None, 7))
        for count in range(8, 12):
            wanted = last_logits(model, tokens[:, :count], 7)
            torch.testing.assert_close(stream.logits, wanted, rtol=1e-10, atol=1e-10)
            stream.append(tokens[:, count])


# Drawing


def brute_force(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """One row (V,), token by token."""
    weights = {token: float(torch.exp(logit / temperature)) for token, logit in enumerate(logits.double())}
    order = sorted(weights, key=weights.get, reverse=True)[: top_k or len(weights)]
    total, kept, reached = sum(weights[token] for token in order), [], 0.0
    for token in order:
        if top_p is None or reached < top_p:
            kept.append(token)
        reached += weights[token] / total
    mass = sum(weights[token] for token in kept)
    return torch.tensor([weights[token] / mass if token in kept else 0.0 for token in range(len(weights))])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (20, None), (None, 0.6), (4, 0.7), (1, 1.0)])
def test_probabilities_of_what_is_drawn(temperature, top_k, top_p):
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * 2
    found = Sampling(temperature=temperature, top_k=top_k, top_p=top_p).probabilities(logits)
    wanted = torch.stack([brute_force(row, temperature, top_k, top_p) for row in logits])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_draws_follow_the_probabilities_and_the_seed():
    logits, sampling = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(20_000, -1), Sampling(top_k=3)
    first, again = (sampling.draw(logits, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    shares = torch.bincount(first, minlength=4) / 20_000
    torch.testing.assert_close(shares, sampling.probabilities(logits[:1])[0], rtol=0, atol=0.02)
    assert Sampling(temperature=0).draw(logits).eq(3).all()


def test_generation_repeats_with_its_seed_stays_within_what_is_allowed_and_leaves_the_model_as_it_was(model):
    model.train()
    prompt = Sequence(torch.randint(VOCABULARY, (3, 7)), prefix_len=6)
    allowed = torch.arange(VOCABULARY) < 4

    def drawn(seed: int, **options) -> torch.Tensor:
        return generate(model, prompt, 12, generator=torch.Generator().manual_seed(seed), **options)

    first = drawn(0, allowed=allowed)
    assert first.shape == (3, 12) and first.max() < 4 and model.training
    assert torch.equal(first, drawn(0, allowed=allowed)) and not torch.equal(first, drawn(1, allowed=allowed))
    assert torch.equal(drawn(0), drawn(0, cached=False))
    model.eval()
    greedy = generate(model, prompt, 3, sampling=Sampling(temperature=0))
    assert torch.equal(greedy[:, 0], last_logits(model, prompt.tokens, 6).argmax(dim=1))


# Errors


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -1.0}, "task.temperature=-1.0 must be 0 or more"),
        ({"top_k": 0}, "task.top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "task.top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "task.top_p=1.5 must be above 0 and at most 1"),
    ],
)
def test_sampling_that_cannot_be_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampling(**options)


def test_prompts_that_do_not_fit_are_one_sentence():
    model = build(SMALL, LAYOUT)

    def refused(count: int, prefix_len: int, **options) -> str:
        prompt = Sequence(torch.zeros(1, count, dtype=torch.int64), prefix_len=prefix_len)
        with pytest.raises(ValueError) as error:
            generate(model, prompt, **{"num_tokens": 2, **options})
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "prefix_len=11 and 1 latents does not fit the model, which reads up to 9 and 5" in refused(12, 11)
    assert "prefix_len=2 and 6 latents" in refused(8, 2)
    assert "longer than the 14 of the model" in refused(15, 9)
    assert "num_tokens=0 must be at least 1" in refused(8, 7, num_tokens=0)
    assert "stride=6 must be 1 to 5" in refused(8, 7, stride=6)
    fields = build(["model=perceiver", "model/size=tiny"], tiny_layout())
    with pytest.raises(ValueError, match="this model predicts fields; one of tokens goes on, like that of model=perc"):
        generate(fields, Sequence(torch.zeros(1, 3, dtype=torch.int64)), 2)
