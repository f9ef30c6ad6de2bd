"""ClimaNet's two models: conversion there and back, parity with their specification in float64, and the defects of the
newer one that ours does not have."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from models import build
from models.convert import SOURCES, climanet, convert, export, recognise
from tests.climanet_reference import FIRST, NEWER, Reference, batch_of, filled_state, golden_sample, our_model

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SCRAMBLED = {**NEWER, "token_order": "reinterpret"}


def predicted(config, sample):
    model, layout = our_model(config, filled_state(config))
    return model(batch_of(layout, sample))[climanet.TARGET][:, :, 0]


@pytest.mark.parametrize("config", (FIRST, NEWER, SCRAMBLED), ids=("first", "newer", "reinterpret"))
def test_outputs_and_gradients_equal_those_of_the_specification(config):
    state, sample = filled_state(config), golden_sample()
    doubles = {name: tensor.double().requires_grad_("running" not in name) for name, tensor in state.items()}
    wanted = Reference(config, doubles)
    model, layout = our_model(config, state)
    output = model(batch_of(layout, sample))[climanet.TARGET][:, :, 0]
    expected = wanted.stages(sample)["decoder"]
    assert_close(output.double(), expected, **CLOSE)

    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output * weights).mean().backward()
    (expected * weights).mean().backward()
    gradients = {name: tensor.grad for name, tensor in doubles.items() if tensor.grad is not None}
    theirs = SOURCES["climanet"].canonical(gradients, config)
    names = SOURCES["climanet"].names(config)
    for name, parameter in model.named_parameters():
        wanted_grad = theirs[names[name]]
        error = (parameter.grad - wanted_grad).norm()
        assert error <= 1e-4 * wanted_grad.norm() + 1e-6, f"{name}: {error:.2e} of {wanted_grad.norm():.2e}"


@pytest.mark.parametrize("config", (FIRST, NEWER), ids=("first", "newer"))
def test_weights_return_unchanged(config):
    state = filled_state(config)
    assert recognise(state) == "climanet"
    model, _ = our_model(config, state)
    returned = export("climanet", model, config)
    assert list(returned.keys() ^ state.keys()) == []
    for name, tensor in state.items():
        assert torch.equal(returned[name], tensor), name


@pytest.mark.parametrize(("config", "count"), (({}, 2_124_826), ({"sh_dim": 96, "scale_dim": 10}, 2_186_964)))
def test_defaults_have_as_many_parameters_as_published(config, count):
    source = SOURCES["climanet"]
    with torch.device("meta"):
        model = build(source.overrides(config, {}), source.layout(config, {}, 1))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("state", "config", "match"), ((FIRST, NEWER, "leave sh_dim"), (NEWER, FIRST, "give its sh_dim"))
)
def test_weights_of_the_other_model_are_refused(state, config, match):
    with pytest.raises(ValueError, match=match):
        convert("climanet", filled_state(state), config)


def test_a_day_changes_its_own_place_only_and_a_padded_day_nothing():
    """The newer model reads a token of row 1, column 3 as one of row 0, column 3, and padded days as others."""
    sample = golden_sample(batch=1)
    changed = replace(sample, x=sample.x.clone(), missing=torch.zeros_like(sample.missing))
    changed.x[0, 0, 0, 2, 4:8, 12:16] += 1
    plain = replace(changed, x=sample.x)
    padded = replace(plain, x=sample.x.clone())
    padded.x[0, 0, 1, -1] += 1
    for config, place, silent in ((NEWER, (1, 3), True), (SCRAMBLED, (0, 3), False)):
        model, layout = our_model(config, filled_state(config))
        with torch.no_grad():
            before, beside = (model.encoder(batch_of(layout, x)).tokens for x in (plain, padded))
            assert torch.equal(beside, before) == silent
            before, after = (model.encoder(batch_of(layout, x, padded=False)).tokens for x in (plain, changed))
        moved = (after - before).abs().amax(dim=(0, 1, 3)).view(3, 4)
        assert (moved > 1e-6).nonzero().tolist() == [list(place)]


def test_places_are_told_apart_by_default():
    """Identical patches give identical tokens in the newer model; rows and columns must not be exchangeable either."""
    _, layout = our_model(FIRST, filled_state(FIRST))
    sample = golden_sample()
    same = replace(sample, x=torch.ones_like(sample.x), missing=torch.zeros_like(sample.missing))

    def spread(*overrides):
        torch.manual_seed(0)
        model = build(["model=sst_spatiotemporal", "model/size=tiny", *overrides], layout)
        tokens = model.encoder(batch_of(layout, same)).tokens[0, 0].unflatten(0, (3, 4))
        return tokens.flatten(0, 1).std(0).mean(), (tokens[0, 2] - tokens[2, 0]).abs().max()

    place, swapped = spread()
    assert place > 0.05 and swapped > 0.05
    assert spread("model.encoder.position=none")[0] < 1e-5  # what the newer model has
    assert spread("model.encoder.position=sum")[1] < 1e-5  # and the first one
