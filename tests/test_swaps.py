"""Every preset and every swap of parts: builds, runs, learns, and survives a checkpoint.

Pairwise by default (every pair of options occurs), the full product with `-m slow`. Data: fields on a
latitude-longitude grid, fields on a plane around a smaller target, and fixed fields with observations on HEALPix and on
a latitude-longitude grid.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from data.batch import Batch
from data.grids import Points
from data.layout import Layout
from data.sequence import Sequence
from models import load
from models.composition import build_from_config, compose
from tests.model_examples import GLOBAL, HOUR, PLANE, SPHERE, observed_layout, tiny_batch, tiny_layout, token_layout

CONF = Path(__file__).resolve().parent.parent / "conf" / "model"
TINY = [
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "model.num_latents=6",
    "model.observation_heads=2",
    "model.patch_size=2",
]
CPU_ATTENTION = ("auto", "reference", "sdpa", "flash")
ALIASES = {"healpix_patch"}  # another name of video_patch
VARIANTS = ("ocean_patches", "ocean_windows")  # parts with other values
REFUSED_FOR_FORECASTS = {"grouped_reconstruction", "pooled"}  # write their inputs back, or one answer
SIZED = ("hip_16", "hip_256", "hip_mini")  # the hierarchical perceiver with sizes of their own
OF_ROWS = {  # cannot do with HEALPix cells; the encoders read no observations
    "encoder": ("grid_patch", "monthly_video", "cross_resolution"),
    "processor": ("spatial_transformer", "local_transformer", "post_norm_transformer"),
    "decoder": ("grid_patch", "monthly_conv"),
}
OF_TOKENS = {"encoder": "token", "processor": "perceiver_ar", "decoder": "token"}  # combined with each other only


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def distinct(group: str, *without: str) -> list[str]:
    apart = {*ALIASES, *SIZED, *VARIANTS, OF_TOKENS[group], *REFUSED_FOR_FORECASTS, *without}
    return [name for name in options(group) if name not in apart]


def pairwise(product: list[tuple]) -> list[tuple]:
    """A greedy subset in which every pair of options of two slots still occurs."""

    def pairs(case):
        return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}

    missing, chosen = set().union(*map(pairs, product)), []
    while missing:
        best = max(product, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


FIELDS = [
    (*case, scope)
    for case in itertools.product(distinct("encoder"), distinct("processor"), distinct("decoder"), CPU_ATTENTION)
    for scope in (("auto", "global") if case[2] == "perceiver_io" else ("auto",))
]
PLANAR = list(itertools.product(distinct("encoder"), distinct("processor"), distinct("decoder")))
OBSERVED = [
    *itertools.product(
        ["healpix"],
        distinct("encoder", *OF_ROWS["encoder"]),
        distinct("processor", *OF_ROWS["processor"]),
        distinct("decoder", *OF_ROWS["decoder"]),
        ("analysis", "forecast"),
    ),
    *itertools.product(
        ["latlon"],
        distinct("encoder", *OF_ROWS["encoder"]),
        distinct("processor"),
        distinct("decoder"),
        ("analysis", "forecast"),
    ),
]
RECONSTRUCTED = list(
    itertools.product(("time", "stream"), ("fourier", "learned"), distinct("processor", *OF_ROWS["processor"]))
)
POOLED = [
    (encoder, processor)
    for number, encoder in enumerate(distinct("encoder"))
    for processor in distinct("processor")[number % 2 :: 2]
]


def parts(encoder: str, processor: str, decoder: str) -> list[str]:
    return [f"model/encoder={encoder}", f"model/processor={processor}", f"model/decoder={decoder}", *TINY]


def layout_for(encoder: str, **options) -> Layout:
    """Fields; two months of two days each for the encoder that weighs days and mixes months."""
    months = {"frames": 4, "frames_per_group": 2} if encoder == "monthly_video" else {}
    return tiny_layout(**months, **options)


def with_fields(encoder, processor, decoder, attention, scope) -> tuple[list[str], Layout]:
    given = [*parts(encoder, processor, decoder), f"model.attention={attention}"]
    if scope != "auto":
        given.append(f"model.decoder.scope={scope}")
    return given, layout_for(encoder, gaps=True)


def with_observations(grid, encoder, processor, decoder, times) -> tuple[list[str], Layout]:
    layout = observed_layout({"healpix": SPHERE, "latlon": GLOBAL}[grid], analysis=times == "analysis", gaps=True)
    return parts(encoder, processor, decoder), layout


def on_a_plane(encoder, processor, decoder) -> tuple[list[str], Layout]:
    layout = layout_for(encoder, grid=PLANE, target_grid=PLANE.window(slice(2, 8), slice(2, 7)))
    return parts(encoder, processor, decoder), layout


def reconstructed_layout() -> Layout:
    return tiny_layout(gaps=True, leads=(-6 * HOUR, 0))


def with_reconstruction(grouping, positions, processor) -> tuple[list[str], Layout]:
    given = [f"model.encoder.grouping={grouping}", f"model.encoder.positions={positions}"]
    given += ["model.encoder.fan_out=true", *parts("hierarchical_perceiver", processor, "grouped_reconstruction")]
    return [*given, "model.encoder.groups=[2,1,2]"], reconstructed_layout()


def masked(batch: Batch, content: float) -> Batch:
    """Some values of every input not observed; `content` stands in their place."""
    inputs = {}
    for name, field in batch.inputs.items():
        if isinstance(field, Sequence):
            valid = torch.arange(field.tokens.shape[1]) >= torch.tensor([[0], [3]])
            token = -1 if content != content else 99  # not in the vocabulary
            inputs[name] = replace(field, tokens=torch.where(valid, field.tokens, token), valid=valid)
            continue
        valid = torch.rand(field.values.shape, generator=torch.Generator().manual_seed(1)) < 0.7
        inputs[name] = replace(field, values=torch.where(valid, field.values, content), valid=valid)
    return replace(batch, inputs=inputs)


def exercise(given: list[str], layout: Layout, folder: Path) -> None:
    torch.manual_seed(0)
    config = compose(given)
    batch = masked(tiny_batch(layout), torch.nan)
    model = build_from_config(config, layout)
    for parameter in model.parameters():  # zero gates and heads would hide every gradient behind them
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)

    (target,) = layout.targets
    output, described = model(batch)[target], layout.targets[target]
    choices = (described.vocab_size,) if layout.sequences else ()
    assert output.shape == (*batch.targets[target].values.shape, *choices)
    sums, weights = model.head.loss(output, batch.targets[target])
    (sums / weights).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
        # Two kinds of biases, of published weights, shift all logits of a row alike.
        if not name.endswith(("attention.key.bias", "score_out.bias")):
            assert parameter.grad.any(), f"the gradient of {name} is zero"

    stored = {
        "format": 1,
        "averaged": False,
        "model": OmegaConf.to_container(config.model, resolve=True),
        "task": OmegaConf.to_container(config.task, resolve=True),
        "layout": layout.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(stored))
    save_file(model.state_dict(), folder / "model.safetensors")
    loaded = load(folder)
    with torch.no_grad():
        expected = model.eval()(batch)[target]
        again = replace(masked(batch, 9.0), layout=loaded.layout)
        assert torch.equal(loaded(again)[target], expected)


@pytest.mark.parametrize("case", pairwise(FIELDS), ids="-".join)
def test_pairs_of_parts(case, tmp_path):
    exercise(*with_fields(*case), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", FIELDS, ids="-".join)
def test_all_parts(case, tmp_path):
    exercise(*with_fields(*case), tmp_path)


@pytest.mark.parametrize("case", pairwise(PLANAR), ids="-".join)
def test_pairs_of_parts_on_a_plane(case, tmp_path):
    exercise(*on_a_plane(*case), tmp_path)


@pytest.mark.parametrize("case", pairwise(OBSERVED), ids="-".join)
def test_pairs_of_parts_with_observations(case, tmp_path):
    exercise(*with_observations(*case), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", OBSERVED, ids="-".join)
def test_all_parts_with_observations(case, tmp_path):
    exercise(*with_observations(*case), tmp_path)


@pytest.mark.parametrize("case", RECONSTRUCTED, ids="-".join)
def test_parts_that_write_their_inputs_back(case, tmp_path):
    exercise(*with_reconstruction(*case), tmp_path)


@pytest.mark.parametrize("case", POOLED, ids="-".join)
def test_parts_before_one_answer_a_sample(case, tmp_path):
    layout = layout_for(case[0], gaps=True, target_grid=Points([[10.0, 20.0]]))
    exercise(parts(*case, "pooled"), layout, tmp_path)


@pytest.mark.parametrize("preset", options("."))
def test_presets(preset, tmp_path):
    given, layout = [f"model={preset}", *TINY], tiny_layout(gaps=True)
    if preset == OF_TOKENS["processor"]:
        layout = token_layout()
    if preset == "sst_spatiotemporal":  # the months of its input
        layout = layout_for("monthly_video", gaps=True, leads=(-12 * HOUR, 0))
    if preset in SIZED:
        given += [f"model.encoder.{name}=16" for name in ("hidden_size", "num_latents", "embed_size")]
        given, layout = [*given, "model.encoder.num_heads=2", "model.encoder.self_per_cross=1"], reconstructed_layout()
        given.append("model.encoder.groups=[4,2,1,2,4]")  # one token a group would leave queries nothing to choose
    if preset == "ocean_perceiver":
        given.append("model.encoder.patch_extent=[60,72]")  # one token a patch would leave queries nothing to choose
    exercise(given, layout, tmp_path)


def of_tokens(**chosen: str) -> list[str]:
    """The model of tokens with some other parts."""
    others = [f"model/{group}={name}" for group, name in chosen.items()]
    return ["model=perceiver_ar", "task=autoregressive", *others, *TINY]


@pytest.mark.parametrize("attention", CPU_ATTENTION)
@pytest.mark.parametrize("processor", ["perceiver_ar", "identity"])
def test_parts_that_read_and_write_tokens(processor, attention, tmp_path):
    given = [*of_tokens(processor=processor), f"model.attention={attention}"]
    exercise(given, token_layout(), tmp_path)


@pytest.mark.parametrize("group", OF_TOKENS)
def test_other_parts_are_refused_for_tokens_and_token_parts_for_fields(group):
    for name in distinct(group, "identity"):
        with pytest.raises(ValueError, match=rf"; use model/{group}={OF_TOKENS[group]}$"):
            build_from_config(compose(of_tokens(**{group: name})), token_layout())
    given = ["task=forecast", f"model/{group}={OF_TOKENS[group]}", *TINY]
    with pytest.raises(ValueError, match=rf"model/{group}={OF_TOKENS[group]} .* use model/{group}=.* or task="):
        build_from_config(compose(given), tiny_layout())


@pytest.mark.parametrize("given", (["model=healda_v2"], ["model=healda_v2", "model/encoder=perceiver"]), ids=len)
def test_no_observations_at_all_give_every_parameter_a_gradient(given):
    torch.manual_seed(0)
    layout = observed_layout()
    model = build_from_config(compose([*given, *TINY]), layout)
    model(tiny_batch(layout, rows=0))["forecast"].square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
        if ".observations." in name and "output" not in name:
            assert not parameter.grad.any(), f"{name} has a gradient without observations"
