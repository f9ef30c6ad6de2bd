"""Tokens of observations: the modulation against NumPy in float64, and their packing into the cells of a grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.layout import ObservationLayout
from data.observation_features import features
from data.observations import Observations
from models.encoders.observation_tokenizer import ObservationTokenizer, pack

LAYOUT = ObservationLayout(num_channels=2048, num_platforms=6, num_types=5, num_features=28, frames=2, step=3600)


def _observations(rows=60, **changes) -> Observations:
    random = torch.Generator().manual_seed(rows)

    def ids(size):
        return torch.randint(0, size, (rows,), generator=random)

    given = {
        "value": torch.randn(rows, generator=random),
        "batch": ids(3),
        "frame": ids(2),
        "channel": ids(2048),
        "platform": ids(6),
        "type": ids(5),
        "times": torch.zeros(3, 2, dtype=torch.int64),
        "latitude": torch.rand(rows, generator=random) * 180 - 90,
        "longitude": torch.rand(rows, generator=random) * 360,
        "time_offset": ids(3600).int(),
        "features": torch.randn(rows, 28, generator=random),
    }
    return Observations(**{**given, **changes})


@pytest.mark.parametrize("platform_size", [8, 0])
def test_a_token_is_a_modulated_value(platform_size):
    torch.manual_seed(0)
    tokenizer = ObservationTokenizer(LAYOUT, token_size=16, platform_size=platform_size)
    with torch.no_grad():
        tokenizer.norm.weight.normal_()
        tokenizer.norm.bias.normal_()
    observations = _observations()
    weights = {name: weight.double().numpy() for name, weight in tokenizer.state_dict().items()}
    described = [observations.features.double().numpy()]
    for name in ("type", "channel", "platform")[: 3 if platform_size else 2]:
        described.append(weights[f"{name}_table.weight"][getattr(observations, name).numpy()])
    hidden = np.concatenate(described, axis=1) @ weights["expand.weight"].T + weights["expand.bias"]
    hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-5)
    hidden = hidden * weights["norm.weight"] + weights["norm.bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    both = hidden @ weights["project.weight"].T + weights["project.bias"]
    expected = both[:, :16] * observations.value.double().numpy()[:, None] + both[:, 16:]
    tokens = tokenizer(observations)
    assert tokens.shape == (60, 16)
    np.testing.assert_allclose(tokens.detach().numpy(), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("token_size", "hidden_size"), [(32, 64), (64, 128), (96, 96)])
def test_default_widths(token_size, hidden_size):
    tokenizer = ObservationTokenizer(LAYOUT, token_size=token_size)
    assert tokenizer.expand.weight.shape == (hidden_size, 28 + 4 + 16 + 8)
    assert tokenizer.channel_table.weight.shape == (2048, 16)


def test_features_are_computed_unless_given():
    tokenizer, observations = ObservationTokenizer(LAYOUT), _observations(features=None)
    given = replace(observations, features=features(observations, 28))
    torch.testing.assert_close(tokenizer(observations), tokenizer(given), rtol=0, atol=0)


def test_every_parameter_has_a_gradient_with_and_without_rows():
    for rows in (60, 0):
        tokenizer = ObservationTokenizer(LAYOUT)
        tokenizer(_observations(rows)).square().sum().backward()
        for name, parameter in tokenizer.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad.abs().sum() > 0) == (rows > 0), name


def test_tokens_are_packed_by_sample_frame_and_cell():
    observations = _observations(60)
    tokens = torch.arange(60.0)[:, None]
    cells = (observations.longitude / 90).long()
    computed = pack(observations, tokens, lambda places: (places[:, 1] / 90).long(), 4)
    given = pack(replace(observations, cell=cells), tokens, None, 4)
    for context in (computed, given):
        assert context.offsets.shape == (3 * 2 * 4 + 1,) and context.offsets[-1] == 60
        flat = ((observations.batch * 2 + observations.frame) * 4 + cells).tolist()
        for cell in range(24):
            held = context.tokens[context.offsets[cell] : context.offsets[cell + 1], 0].int().tolist()
            assert held == [row for row in range(60) if flat[row] == cell]


def test_rows_outside_the_grid_reach_no_cell():
    observations = _observations(60)
    cells = torch.arange(60) % 4
    cells[[3, 7]] = torch.tensor([-1, 4])
    context = pack(replace(observations, cell=cells), torch.arange(60.0)[:, None], None, 4)
    assert context.offsets[-1] == 58 and set(context.tokens[58:, 0].tolist()) == {3, 7}


def test_gradients_reach_the_tokens_through_packing():
    observations = _observations(60, cell=torch.arange(60) % 4)
    tokens = torch.randn(60, 3, requires_grad=True)
    pack(observations, tokens, None, 4).tokens.sum().backward()
    assert torch.equal(tokens.grad, torch.ones(60, 3))


@pytest.mark.parametrize("whole", [False, True])
def test_sixteen_bits_keep_the_precision_of_values(whole):
    torch.manual_seed(0)
    tokenizer, observations = ObservationTokenizer(LAYOUT), _observations()
    expected = tokenizer(observations)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        tokens = (tokenizer.bfloat16() if whole else tokenizer)(observations)
    assert tokens.dtype == torch.float32
    assert (tokens - expected).abs().max() < 0.03 * expected.abs().max()
