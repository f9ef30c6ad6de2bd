"""Composition: what a user types, what comes out, and the one sentence for what cannot be meant."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf

from data.layout import InputLayout, Layout
from models import build, load
from models.composition import build_from_config, check, compose, with_size
from models.refusals import REFUSALS
from tests.model_examples import (
    COARSE,
    GLOBAL,
    PLANE,
    REGION,
    STATIONS,
    TEMPERATURE,
    observed_layout,
    tiny_batch,
    tiny_layout,
    token_layout,
)

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
TINY = [
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "model.num_latents=6",
    "model.patch_size=2",
]

WRONG = {
    "a string in a slot": (["model.encoder=perceiver"], "use model/encoder=perceiver"),
    "an unknown string in a slot": (
        ["model.decoder=nope"],
        "use model/decoder=grid_patch|",
    ),
    "a size with a dot": (["model.size=tiny"], "use model/size=tiny"),
    "an unknown root key": (["+cps=8"], "did you mean 'cp'"),
    "an unknown scalar of the model": (["+model.hiden_size=8"], "did you mean 'hidden_size'"),
    "an unknown key of a part": (["+model.encoder.contxt=1"], "did you mean 'context'"),
    "a word for a number": (["model.depth=four"], "model.processor.depth='four' is not a whole number"),
    "a fraction for a whole number": (["model.decoder.window=2.5"], "model.decoder.window=2.5 is not a whole number"),
    "a number for a switch": (["model.decoder.zero_head=3"], "is not true or false"),
    "null for a number": (["model.hidden_size=null"], "hidden_size=None is not a whole number"),
    "a word for a list of the task": (["task.lead_times=soon"], "task.lead_times='soon' is not a list"),
    "a target outside the project": (["model.encoder._target_=os.system"], "outside this project"),
    "a target of another package": (["data._target_=numpy.load"], "outside this project"),
    "a target that is no class": (["model.encoder._target_=models.nothing.Nobody"], "names no class"),
    "a foreign class seen through the project": (["model.encoder._target_=models.heads.dataclass"], "names no class"),
    "no rank at all": (["cp=0"], "cp=0 must be at least 1"),
    "an attention that does not exist": (["model.attention=fast"], "use model.attention=auto|reference"),
    "an attention of another device": (["model/attention=flex", "trainer.device=cpu"], "needs a CUDA device"),
    "a loss that does not exist": (["task.loss=l7"], "use one of mse, l1, huber"),
    "a head that does not exist": (["task.head=oracle"], "use one of deterministic"),
    "an even window": (["model.decoder.window=4"], "must be an odd number"),
    "an even neighbourhood": (["model.decoder.features=2"], "odd number of cells"),
    "a negative context": (["model.encoder.context=-1"], "must be 0 or more"),
    "an empty patch": (["model.patch_size=0"], "model.patch_size=4"),
    "heads that do not divide": (["model.num_heads=5"], "not divisible by 5 heads"),
    "an unknown scope": (["model.decoder.scope=everywhere"], "use one of auto, global, local"),
    "an unknown activation": (["model.mlp=swish"], "use model.mlp="),
    "an unknown sharing": (["model/encoder=perceiver", "model.encoder.share_cross=some"], "use one of none, all"),
    "no cross-attention": (["model/encoder=perceiver", "model.encoder.num_cross=0"], "must be at least 1"),
    "an unknown spacing": (["model.encoder.spacing=random"], "allowed: linear, log"),
}


@pytest.mark.parametrize("given, sentence", WRONG.values(), ids=WRONG)
def test_wrong_settings_are_one_sentence_with_the_fix(given, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        build(["model/size=tiny", *given], tiny_layout())
    assert "\n" not in str(error.value)


def test_hydra_names_the_options_that_exist():
    with pytest.raises(HydraException, match="perceiver_io"):
        compose(["model/decoder=nope"])
    with pytest.raises(HydraException, match="abc"):
        compose(["+cp=abc"])


def test_a_typo_in_the_file_of_a_part_is_found():
    config = compose([])
    OmegaConf.set_struct(config, False)
    config.model.processor.dept = 3
    with pytest.raises(ValueError, match=r"model.processor has no setting 'dept'; did you mean 'depth'"):
        check(config, [])


def test_a_part_without_a_required_setting_is_found():
    config = compose([])
    OmegaConf.set_struct(config, False)
    del config.model.processor["depth"]
    with pytest.raises(ValueError, match=r"model.processor needs 'depth'"):
        check(config, [])


@pytest.mark.parametrize("spelling", ("cp=1", "+cp=1", "++cp=1", "dp=1", "+dp=1"))
def test_ranks_can_be_spelled_both_ways(spelling):
    assert compose([spelling])[spelling.lstrip("+").split("=")[0]] == 1


def test_attention_can_be_spelled_as_group_or_scalar():
    for spelling in ("model/attention=sdpa", "model.attention=sdpa"):
        config = compose([spelling])
        assert {config.model[part].attention for part in ("processor", "decoder")} == {"sdpa"}


def test_automatic_size_is_what_the_data_recommends_and_overrides_beat_it():
    tiny, base = compose(["model/size=tiny"]), compose(["model/size=base"])
    automatic = compose(["data.recommended.size=base", "model.depth=2"])
    assert automatic.model.size == "base"
    assert automatic.model.hidden_size == base.model.hidden_size != tiny.model.hidden_size
    assert automatic.model.depth == 2
    assert compose(["model/size=auto", "data.recommended.size=tiny"]).model.hidden_size == tiny.model.hidden_size
    assert compose(["model/size=tiny", "data.recommended.size=base"]).model.size == "tiny"


def test_explicit_size_of_a_data_set_without_recommendation():
    assert compose(["data.recommended=null"]).model.size == "small"


def test_presets_of_a_users_own_folder_get_their_size_too(tmp_path):
    (tmp_path / "model").mkdir()
    preset = "# @package _global_\ndefaults:\n  - perceiver\n  - _self_\nmodel:\n  name: mine\n  mlp_ratio: 3.0\n"
    (tmp_path / "model" / "mine.yaml").write_text(preset)
    config = with_size("tiny", ["model=mine", "model/size=auto"], [str(CONF), str(tmp_path)])
    assert (config.model.name, config.model.mlp_ratio, config.model.size) == ("mine", 3.0, "tiny")


def test_build_and_load_inside_a_running_hydra_application():
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        running = GlobalHydra.instance().hydra
        model = build(["model=perceiver", *TINY], tiny_layout())
        assert GlobalHydra.instance().hydra is running
        assert hydra_compose("train").model.name == "perceiver_io"
    assert model(tiny_batch(model.layout))["forecast"].shape == (2, 3, 2, 6, 10)


def test_build_reads_the_layout_of_its_data():
    given = ["data=synthetic", "model/size=tiny"]
    model = build(given)
    assert next(iter(model.layout.inputs)) == "prognostic"
    assert build_from_config(compose(given), model.layout).state_dict().keys() == model.state_dict().keys()


def test_importing_models_is_light_and_build_is_found_lazily():
    code = (
        "import sys, models; assert 'hydra' not in sys.modules; from models import build, load; print(build.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "build"


# Loading


@pytest.fixture
def checkpoint(tmp_path):
    from safetensors.torch import save_file

    config, layout = compose(TINY), tiny_layout()
    model = build_from_config(config, layout)
    torch.nn.init.normal_(model.decoder["forecast"].head.weight)
    stored = {"format": 1, "model": OmegaConf.to_container(config.model, resolve=True), "layout": layout.to_dict()}
    stored["averaged"] = False
    stored["task"] = OmegaConf.to_container(config.task, resolve=True)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path, model, stored


def test_load_prefers_averaged_weights(checkpoint):
    from safetensors.torch import save_file

    folder, model, stored = checkpoint
    averaged = {name: value + 1 for name, value in model.state_dict().items()}
    save_file(averaged, folder / "ema.safetensors")
    (folder / "config.json").write_text(json.dumps({**stored, "averaged": True}))
    name = "decoder.forecast.head.weight"
    assert torch.equal(load(folder).state_dict()[name], averaged[name])
    assert torch.equal(load(folder, ema=False).state_dict()[name], model.state_dict()[name])
    (folder / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks ema\.safetensors"):
        load(folder)


def test_load_on_a_machine_without_the_attention_of_the_run(checkpoint, monkeypatch):
    folder, model, stored = checkpoint
    for place in (stored["model"], *(stored["model"][part] for part in ("processor", "decoder"))):
        place["attention"] = "cudnn"
    (folder / "config.json").write_text(json.dumps(stored))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    batch = tiny_batch(model.layout)
    assert torch.equal(load(folder)(batch)["forecast"], model.eval()(batch)["forecast"])


@pytest.mark.parametrize("damage", ("empty", "format", "target", "weights", "json"))
def test_a_folder_that_is_no_checkpoint_is_one_sentence(checkpoint, damage):
    folder, _, stored = checkpoint
    if damage == "empty":
        (folder / "config.json").unlink()
    elif damage == "format":
        (folder / "config.json").write_text(json.dumps({**stored, "format": 99}))
    elif damage == "target":
        stored["model"]["encoder"]["_target_"] = "subprocess.Popen"
        (folder / "config.json").write_text(json.dumps(stored))
    elif damage == "weights":
        (folder / "model.safetensors").write_bytes(b"not weights")
    else:
        (folder / "config.json").write_text("{")
    with pytest.raises(ValueError) as error:
        load(folder)
    assert "\n" not in str(error.value)


# Refusals and files


def _two_lengths() -> Layout:
    layout, other = tiny_layout(), InputLayout((TEMPERATURE,), GLOBAL, 3, 21_600)
    return Layout(inputs={**layout.inputs, "satellite": other}, targets=layout.targets)


RECONSTRUCTED = tiny_layout(leads=(0,))
RECURRENT = ["model/encoder=perceiver", "model.encoder.inputs_per_iteration=timestep"]
SMALL_HIP = [f"model.encoder.{name}=16" for name in ("hidden_size", "num_latents", "num_heads", "embed_size")]

# One entry a row of the table: overrides and a layout that it refuses.
REFUSED = {
    "an encoder of fields for tokens": (["model=perceiver_ar", "model/encoder=perceiver"], token_layout()),
    "a decoder of fields for tokens": (["model=perceiver_ar", "model/decoder=perceiver_io"], token_layout()),
    "tokens that read later ones": (["model=perceiver_ar", "model/processor=latent_transformer"], token_layout()),
    "an encoder of tokens for fields": (["model/encoder=token"], tiny_layout()),
    "a decoder of tokens for fields": (["model/decoder=token"], tiny_layout()),
    "a processor of tokens for fields": (["model/processor=perceiver_ar"], tiny_layout()),
    "patches of stations": (["model/encoder=grid_patch", "model/processor=latent_transformer"], tiny_layout(STATIONS)),
    "patches of two grids": (["model/encoder=grid_patch"], tiny_layout(boundary=COARSE)),
    "observations unread": (["model/encoder=grid_patch"], observed_layout(GLOBAL, analysis=False)),
    "days of two grids": (["model/encoder=monthly_video"], tiny_layout(boundary=COARSE)),
    "days written to stations": (["model/decoder=monthly_conv"], tiny_layout(target_grid=STATIONS)),
    "frames of stations": (["model=video_dit"], tiny_layout(STATIONS, target_grid=GLOBAL)),
    "frames of two grids": (["model=video_dit"], tiny_layout(boundary=COARSE)),
    "patches written to stations": (["model=video_dit"], tiny_layout(target_grid=STATIONS)),
    "frames that do not pair": (["model/encoder=perceiver", "model.encoder.frames=each"], _two_lengths()),
    "grid patches written to stations": (["model/decoder=grid_patch"], tiny_layout(target_grid=STATIONS)),
    "rows and columns of HEALPix": (["model=healda_v2", "model/processor=spatial_transformer"], observed_layout()),
    "degrees on a plane": (["model=video_dit", "model.processor.radius=20"], tiny_layout(PLANE)),
    "windows among stations": (["model=perceiver", "model.decoder.scope=local"], tiny_layout(STATIONS)),
    "lead times of an analysis": (["model=hip_metnet", "model.condition=all"], observed_layout()),
    "nothing read back to write": (["model=perceiver", "model/decoder=grouped_reconstruction"], RECONSTRUCTED),
    "other cells than those read back": (
        ["model=hip_mini", *SMALL_HIP, "model/processor=spatial_transformer"],
        RECONSTRUCTED,
    ),
    "a forecast as reconstruction": (["model=hip_mini", *SMALL_HIP], tiny_layout()),
    "one answer for many places": (["model=perceiver", "model/decoder=pooled"], tiny_layout()),
    "a recurrence over frames that do not pair": ([*RECURRENT, "model.encoder.frames=joint"], _two_lengths()),
    "a recurrence over single frames": ([*RECURRENT, "model.encoder.frames=each"], tiny_layout()),
    "streams and observations": (["model=hip_mini", *SMALL_HIP, "model/decoder=perceiver_io"], observed_layout()),
}


SENTENCES = {row.sentence for row in REFUSALS}


def refusal(given: list[str], layout: Layout) -> str:
    with pytest.raises(ValueError) as error:
        build([*given, *TINY], layout)
    return str(error.value)


@pytest.mark.parametrize("given, layout", REFUSED.values(), ids=REFUSED)
def test_every_refusal_has_its_sentence_and_its_override_works(given, layout):
    sentence = refusal(given, layout)
    assert sentence in SENTENCES
    instead = re.search(r"use (\S+)(?: or \S+)?$", sentence).group(1)
    kept = [override for override in given if override.split("=")[0] != instead.split("=")[0]]
    if instead.startswith("model/encoder="):  # options of the encoder that is replaced go with it
        kept = [override for override in kept if not override.startswith("model.encoder.")]
    model = build([*kept, instead, *TINY], layout)
    assert all(output.isfinite().all() for output in model(tiny_batch(layout)).values())


def test_every_refusal_has_a_test():
    assert len(REFUSED) == len(REFUSALS) == len(SENTENCES)
    assert {refusal(given, layout) for given, layout in REFUSED.values()} == SENTENCES


def test_a_target_elsewhere_than_the_inputs_runs_with_every_part():
    for given in (["model/encoder=grid_patch"], ["model/encoder=perceiver"], ["model=patch_transformer"]):
        layout = tiny_layout(GLOBAL, target_grid=REGION)
        assert build([*given, *TINY], layout)(tiny_batch(layout))["forecast"].shape == (2, 3, 2, 7, 9)


def test_no_file_sets_ranks():
    for path in CONF.rglob("*.yaml"):
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False) or {}
        for key in ("cp", "dp"):
            assert content.get(key) is None, f"{path} sets {key}: +{key}=8 would fail"


def test_presets_never_write_inside_a_slot_nor_scalars_that_sizes_own():
    owned = set(OmegaConf.load(CONF / "model/size/tiny.yaml")) - {"size"}
    for path in (CONF / "model").glob("*.yaml"):
        assert path.read_text().startswith("# @package _global_"), path
        model = OmegaConf.to_container(OmegaConf.load(path), resolve=False)["model"]
        assert not owned & set(model), f"{path} sets what sizes own"
        assert not any(isinstance(value, dict) for value in model.values()), f"{path} writes inside a slot"
        assert model["name"] == path.stem


def test_files_of_parts_name_their_class_and_read_only_scalars_of_the_model():
    for slot in ("encoder", "processor", "decoder"):
        for path in (CONF / "model" / slot).glob("*.yaml"):
            text = path.read_text()
            if "defaults:" in text:  # a variant of another file
                assert "_target_" not in text
                continue
            assert f"_target_: models.{slot}s.{path.stem}." in text, path
            assert not re.search(r"\$\{model\.\w+\.", text), f"{path} reads another part's settings"
