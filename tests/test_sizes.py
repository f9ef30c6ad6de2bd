"""Sizes that fit: the memory estimate against what autograd keeps, and what `model/size=auto` makes of it."""

from dataclasses import replace

import pytest
import torch

from data.grids import LatLonGrid
from models.composition import build_from_config, compose
from models.memory import training_bytes
from models.summary import COPIES_IN_TRAINING, KeptTensors
from tests.model_examples import tiny_batch, tiny_layout
from training import sizes
from training.ranks import Mesh


def kept_bytes(config, layout, *, places=1.0):
    """Copies of the weights, and what autograd keeps in a real step."""
    model = build_from_config(config, layout).train()
    batch = tiny_batch(layout, batch_size=3)
    if places < 1:
        batch = replace(batch, places=model.draw_places(places))
    kept = KeptTensors(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        model(batch)
    return COPIES_IN_TRAINING * 4 * sum(parameter.numel() for parameter in model.parameters()) + kept.bytes


@pytest.mark.parametrize("preset", ["perceiver_io", "perceiver", "patch_transformer", "video_dit"])
def test_the_estimate_is_what_a_real_step_keeps(preset):
    config = compose([f"model={preset}", "model/size=tiny", "model.patch_size=2", "model.attention=blockwise"])
    layout = tiny_layout()
    estimate = training_bytes(config, layout, batch_size=3, sixteen_bit=False)
    assert 0.9 < estimate / kept_bytes(config, layout) < 1.4


def test_places_that_are_not_decoded_take_no_memory():
    overrides = ["model/processor=identity", "model/size=tiny", "model.hidden_size=16", "model.patch_size=2"]
    layout = tiny_layout(LatLonGrid.with_poles(41, 80))
    estimates = []
    for share in (1.0, 0.25):
        config = compose([*overrides, f"task.query_fraction={share}"])
        estimates.append(training_bytes(config, layout, batch_size=3, sixteen_bit=False))
        assert 0.9 < estimates[-1] / kept_bytes(config, layout, places=share) < 1.4
    assert estimates[1] < 0.6 * estimates[0]


def test_of_recomputed_blocks_one_at_a_time_is_kept():
    def config(checkpoint):
        overrides = ["model=video_dit", "model/size=tiny", "model.depth=5", "model.patch_size=2"]
        return compose([*overrides, "model.attention=blockwise", f"model.processor.checkpoint={checkpoint}"])

    layout = tiny_layout()
    estimate = training_bytes(config("all"), layout, batch_size=3, sixteen_bit=False)
    assert 0.9 < estimate / kept_bytes(config(4), layout) < 1.4


def test_recomputing_blocks_needs_less():
    layout = tiny_layout()
    plain, recomputed = (
        training_bytes(
            compose(["model=video_dit", "model/size=base", f"model.processor.checkpoint={option}"]),
            layout,
            batch_size=64,
            sixteen_bit=False,
        )
        for option in ("none", "all")
    )
    assert recomputed < 0.6 * plain


def test_automatic_sizes_step_down_until_they_fit(monkeypatch, capsys):
    overrides = ["model=video_dit", "data.recommended.size=production"]
    monkeypatch.setattr(sizes, "with_size", lambda size: compose([*overrides, f"model/size={size}"]))
    monkeypatch.setattr(sizes, "available_bytes", lambda device, ranks=1: 2**30)
    chosen = sizes.fitted(compose(overrides), tiny_layout(), Mesh(), automatic=True)
    printed = capsys.readouterr().out
    assert chosen.model.size in ("small", "base") and chosen.model.hidden_size < 1536
    assert f"model/size={chosen.model.size}: the largest that fits 1 GiB" in printed and "forces another" in printed
    with pytest.raises(ValueError, match=r"model/size=production needs about .* and this cpu device has 1 GiB"):
        sizes.fitted(compose(overrides), tiny_layout(), Mesh(), automatic=False)
    monkeypatch.setattr(sizes, "available_bytes", lambda device, ranks=1: 2**10)
    with pytest.raises(ValueError, match="model/size=tiny needs about"):
        sizes.fitted(compose(overrides), tiny_layout(), Mesh(), automatic=True)


def test_a_size_that_fits_says_why(capsys):
    config = compose(["model=video_dit", "data.recommended.size=tiny"])
    assert sizes.fitted(config, tiny_layout(), Mesh(), automatic=True) is config
    assert "model/size=tiny: what the data recommends" in capsys.readouterr().out
    assert sizes.fitted(config, tiny_layout(), Mesh(), automatic=False) is config
    assert capsys.readouterr().out == ""
