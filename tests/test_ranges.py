"""Numbers outside their range are refused before anything is built, by the name of the option."""

import pytest

from models.composition import compose
from models.ranges import check_options

WRONG = [
    ("model.hidden_size=0", "model.encoder.hidden_size=0 must be at least 1"),
    ("model.num_heads=-1", "num_heads=-1 must be at least 1; type model.processor.num_heads="),
    ("model.encoder.num_bands=0", "model.encoder.num_bands=0 must be at least 1"),
    ("model.processor.depth=-1", "model.processor.depth=-1 must be 0 or more"),
    ("model.mlp_ratio=0", "mlp_ratio=0 must be above 0"),
    ("model.drop_path=1", "model.processor.drop_path=1 must be at least 0 and below 1"),
    ("model.decoder.attention_dropout=-0.1", "model.decoder.attention_dropout=-0.1 must be at least 0"),
    ("data.annual_harmonics=-1", "data.annual_harmonics=-1 must be 0 or more"),
    ("data.recommended.max_steps=many", "data.recommended.max_steps=many must be at least 1"),
    ("data.split=7", "data.split=7 is not a mapping {name: value}"),
    ("seed=-1", "seed=-1 must be 0 or more"),
    ("optimizer.lr=0", "optimizer.lr=0.0 must be above 0"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0 must be 0 or more"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9] must be two numbers"),
    ("optimizer.betas=[0.9,1.5]", "optimizer.betas=1.5 must be at least 0 and below 1"),
    ("scheduler.warmup_steps=-1", "scheduler.warmup_steps=-1 must be 0 or more"),
    ("scheduler.final_lr_fraction=2", "scheduler.final_lr_fraction=2.0 must be between 0 and 1"),
    ("trainer.clip_norm=0", "trainer.clip_norm=0.0 must be above 0"),
    ("trainer.validation_batches=0", "trainer.validation_batches=0 must be at least 1"),
    ("trainer.overfit_batches=-1", "trainer.overfit_batches=-1 must be 0 or more"),
]


@pytest.mark.parametrize(("override", "message"), WRONG, ids=[override for override, _ in WRONG])
def test_a_number_outside_its_range_is_refused_by_name(override, message):
    with pytest.raises(ValueError) as caught:
        compose(["model/size=tiny", override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", ["perceiver_io", "perceiver", "patch_transformer"])
def test_every_preset_lies_within_the_ranges(preset):
    compose([f"model={preset}", "trainer.clip_norm=null", "scheduler.final_lr_fraction=1"])


def test_bounds_are_inside_or_outside_as_the_words_say():
    for name, inside, outside in (
        ("hidden_size", 1, 0),
        ("depth", 0, -1),
        ("mlp_ratio", 1e-9, 0),
        ("dropout", 0, 1),
        ("dropout", 0.999, -1e-9),
    ):
        check_options("part", {name: inside})
        check_options("part", {name: None})
        with pytest.raises(ValueError, match=f"part.{name}="):
            check_options("part", {name: outside})
