"""What whole samples and tokens are conditioned on: noise level, label, local time; the published formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from data.batch import Condition
from kernels.modulated_norm import gated, modulated_norm
from models.conditioning.adaptive_norm import AdaptiveNorm
from models.conditioning.noise_level import DiTEmbedder, EDMEmbedder, NoiseFeatures, ZeroEmbedder
from models.positions.time import LocalCalendar

SIZE, WIDTH, LABEL = 6, 8, 3


def randomised(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.double()


def condition() -> Condition:
    return Condition(torch.tensor([0.0, 0.7, 30.0]), torch.randn(3, LABEL, dtype=torch.float64))


def noise_features(level: float) -> list[float]:
    rates = [10_000 ** (-j / (WIDTH // 2 - 1)) for j in range(WIDTH // 2)]
    return [math.sin(level * rate) for rate in rates] + [math.cos(level * rate) for rate in rates]


def test_noise_features_are_sines_then_cosines_of_frequencies_with_both_ends():
    found = NoiseFeatures(WIDTH)(torch.tensor([0.0, 0.7, 30.0]))
    wanted = torch.tensor([noise_features(level) for level in (0.0, 0.7, 30.0)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-6)
    for wrong in (2, 7):
        with pytest.raises(ValueError, match=rf"model\.condition\.num_features={wrong} must be even and at least 4"):
            NoiseFeatures(wrong)


@pytest.mark.parametrize("kind", (EDMEmbedder, DiTEmbedder))
@pytest.mark.parametrize("label_size", (0, LABEL))
def test_embedders_equal_their_formulas(kind, label_size):
    embedder = randomised(kind(size=SIZE, num_features=WIDTH, label_size=label_size))
    given = condition()
    embedder.noise.float()
    features = embedder.noise(given.noise_level).double()
    embedder.noise.forward = lambda _: features
    if kind is EDMEmbedder:
        joined = features
        if label_size:
            joined = joined + (given.label * math.sqrt(LABEL)) @ embedder.label.weight.T + embedder.label.bias
        wanted = embedder.out(silu(embedder.up(joined)))
    else:
        wanted = embedder.out(silu(embedder.up(features)))
        if label_size:
            wanted = wanted + given.label @ embedder.label.weight.T
    torch.testing.assert_close(embedder(given), wanted)


@pytest.mark.parametrize("kind", (EDMEmbedder, DiTEmbedder))
def test_a_missing_or_foreign_label_is_refused(kind):
    embedder = kind(size=SIZE, num_features=WIDTH, label_size=LABEL)
    for label, given in ((None, "none"), (torch.zeros(1, 5), r"\(1, 5\)")):
        with pytest.raises(ValueError, match=f"labels of 3 numbers and the batch has {given}; set label_size"):
            embedder(Condition(torch.zeros(1), label))


def test_labels_are_dropped_for_whole_samples_in_training_only():
    embedder = randomised(EDMEmbedder(size=SIZE, num_features=WIDTH, label_size=LABEL, label_dropout=0.4)).float()
    many = 4000
    given = Condition(torch.zeros(many), torch.ones(many, LABEL))
    with_label = embedder.eval()(given)
    assert (with_label == with_label[0]).all()
    without = embedder(Condition(torch.zeros(many), torch.zeros(many, LABEL)))[0]
    found = embedder.train()(given)
    dropped = (found - without).abs().amax(dim=1) < 1e-5
    kept = (found - with_label[0]).abs().amax(dim=1) < 1e-5
    assert (dropped ^ kept).all()
    assert abs(dropped.float().mean() - 0.4) < 5 * math.sqrt(0.24 / many)


def test_without_a_condition_modulations_are_learned_constants():
    assert ZeroEmbedder()(condition()) is None and ZeroEmbedder.size == 0
    norm = randomised(AdaptiveNorm(0, 4, parts=3))
    assert [name for name, _ in norm.named_parameters()] == ["constant"]
    parts = norm(None, 5)
    assert torch.equal(torch.cat(parts, dim=1), norm.constant.expand(5, 12))


def test_adaptive_norms_and_gates_equal_their_formulas_and_begin_as_nothing():
    torch.manual_seed(0)
    x, branch, given = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 3, 5, 4).double(), torch.randn(2, SIZE).double()
    fresh = AdaptiveNorm(SIZE, 4, parts=3).double()
    shift, scale, gate = fresh(given, 2)
    assert not any(part.any() for part in (shift, scale, gate))
    assert torch.equal(gated(x, gate, branch), x)
    norm = randomised(AdaptiveNorm(SIZE, 4, parts=3))
    shift, scale, gate = norm(given, 2)
    vector = silu(given) @ norm.linear.weight.T + norm.linear.bias
    for part, wanted in zip((shift, scale, gate), vector.split(4, dim=1), strict=True):
        torch.testing.assert_close(part, wanted)
    deviation = x - x.mean(-1, keepdim=True)
    plain = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    wanted = plain * (1 + scale[:, None, None]) + shift[:, None, None]
    torch.testing.assert_close(modulated_norm(x, shift, scale), wanted)
    torch.testing.assert_close(gated(x, gate, branch), x + gate[:, None, None] * branch)


# Local time


def test_the_local_calendar_equals_its_formula():
    longitude = torch.tensor([0.0, 45.0, 67.5, 11.25, 359.99, -22.5])
    seconds = torch.tensor([[0.0, 21_600.0], [43_200.0, 86_399.0]])
    days = torch.tensor([[0.0, 31.25], [180.5, 365.9]])
    found = LocalCalendar(12, longitude)(seconds, days)
    assert found.shape == (2, 2, 6, 12) and found.dtype == torch.float32
    for b, t, x in np.ndindex(2, 2, 6):
        offset = math.floor((longitude[x].item() % 360) * 86_400 / 360)
        local = (seconds[b, t].item() + offset) % 86_400 / 86_400
        season = days[b, t].item() / 365.25 % 1
        wanted = [
            function(2 * math.pi * k * phase)
            for phase in (local, season)
            for function in (math.cos, math.sin)
            for k in (1, 2, 3)
        ]
        np.testing.assert_allclose(found[b, t, x], wanted, atol=2e-5)


def test_local_time_moves_with_the_sun():
    """Six hours later a quarter turn to the west has the same local time."""
    calendar = LocalCalendar(8, torch.tensor([10.0, 100.0]))
    day = torch.tensor([[100.0, 100.0]])
    found = calendar(torch.tensor([[0.0, 21_600.0]]), day)[0]
    torch.testing.assert_close(found[0, 1], found[1, 0], rtol=0, atol=1e-5)
    assert (found[0, 0] - found[1, 0]).abs().max() > 0.5


def test_a_width_without_whole_harmonics_is_refused():
    with pytest.raises(ValueError, match=r"model\.hidden_size=10 must be a multiple of 4"):
        LocalCalendar(10, torch.zeros(1))
