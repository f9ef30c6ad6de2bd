"""`python train.py task=nowcast` and `evaluate.py` as a person uses them, on small synthetic showers."""

import base64
import io
import json
import re

import pytest
import torch

from tests.radar_examples import showers, write

SMALL = [
    "task=nowcast",
    "data=knmi_radar",
    "data.variable=rain",
    "data.window=[[8,56],[8,64]]",
    "data.split={train: 0.5, validation: 0.25, test: 0.25}",
    "task.lead_minutes=[5,15]",
    "task.input_frames=2",
    "task.crop=16",
    "task.context=8",
    "task.fss_windows=[3]",
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "model.num_latents=6",
    "model.calendar=none",
    "trainer.max_steps=2",
    "trainer.batch_size=2",
    "trainer.validation_batches=1",
    "trainer.progress=false",
    "tracking=none",
]


@pytest.fixture
def radar(tmp_path):
    """A file with a missing frame and a corner out of range."""
    kept = [frame for frame in range(32) if frame != 27]
    return f"data.path={write(tmp_path / 'radar.nc', showers(32), corner=12, keep=kept)}"


def test_a_run_trains_scores_reports_and_is_evaluated_again(command, radar, tmp_path):
    import xarray as xr
    from PIL import Image

    folder = tmp_path / "run"
    code, out, err = command("train", *SMALL, radar, "model=perceiver_io", f"hydra.run.dir={folder}")
    assert code == 0, err
    scores = json.loads((folder / "scores.json").read_text())["rain_rate"]
    assert {"mae", "crps", "csi_0.5", "csi_2", "fss_0.5_3px"} <= set(scores) and list(scores["mae"])[1] == "0.25"
    methods = scores["mae"]["0.25"]
    assert {"ours", "network alone", "persistence", "lucas_kanade"} <= set(methods)
    assert methods["lucas_kanade"] < methods["persistence"]  # the showers only drift
    reliability = json.loads((folder / "reliability.json").read_text())["0.5"]["15"]
    assert sum(reliability["counts"]) > 0
    assert len(json.loads((folder / "checkpoints" / "best" / "probability_thresholds.json").read_text())) == 2
    page = (folder / "report.html").read_text()
    assert "data:image/gif;base64," in page and page.count("data:image/png;base64,") >= 4 and "http" not in page
    assert "CSI of 0.5 mm/h" in out
    moving = re.search('data:image/gif;base64,([^"]+)', page)[1]
    with Image.open(io.BytesIO(base64.b64decode(moving))) as animation:
        assert animation.n_frames == 2
        animation.seek(1)
        colours = {colour for _, colour in animation.convert("RGB").getcolors(2**20)}
        assert any(min(colour) > 250 for colour in colours)  # white where dry
        assert not any(red > 200 and green < 80 and blue > 80 for red, green, blue in colours)  # none that is not ours
    with xr.open_dataset(folder / "predictions.nc") as predictions:
        assert predictions["rain_rate"].dims == ("init_time", "lead_time", "y", "x")
        assert predictions["rain_rate"].shape == (5, 2, 48, 56) and float(predictions["rain_rate"].min()) >= 0

    code, out, err = command("evaluate", f"run={folder}", "max_windows=1", "report=false")
    assert code == 0, err
    assert "1 forecasts of the test split" in out
    code, out, err = command("evaluate", f"run={folder}", "weights=cos")
    assert code == 1 and "weights=cos has no effect for task=nowcast" in err


@pytest.mark.parametrize(
    "options",
    [
        [
            "model=patch_transformer",
            "task.leads=all",
            "task.head=deterministic",
            "task.loss=huber",
            "model.patch_size=8",
        ],
        ["model=hip_metnet", "model.patch_size=8"],
        pytest.param(
            [
                "model=perceiver",
                "task.motion=false",
                "task.reference=persistence",
                "task.probability_thresholds=median",
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["patch_transformer", "hip_metnet", "perceiver"],
)
def test_other_models_and_ways_to_read_the_rain(command, radar, tmp_path, options):
    folder = tmp_path / "run"
    code, _, err = command("train", *SMALL, radar, *options, "report=false", f"hydra.run.dir={folder}")
    assert code == 0, err
    scores = json.loads((folder / "scores.json").read_text())["rain_rate"]
    ours = torch.tensor([by_method["ours"] for by_method in scores["mae"].values()])
    assert torch.isfinite(ours).all()
    assert "network alone" not in scores["mae"]["0.25"] or "hip_metnet" in options[0]
    # A network that starts at its reference cannot be far from it after two steps.
    if "patch_transformer" in options[0]:
        assert ours[1] < scores["mae"]["0.25"]["persistence"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["task.bins=[0.5,2,2]"], "task.bins=[0.5, 2, 2] must be increasing edges"),
        (["task.crop=80"], "is larger than the image (64 x 72 pixels"),
        (
            ["data=ncep_slp"],
            "task=nowcast needs a sequence of radar images, like data=knmi_radar; with this data use",
        ),
        (
            ["model/decoder=grid_patch", "model/processor=video_dit", "model.processor.radius=5"],
            "degrees on the sphere",
        ),
    ],
)
def test_what_makes_no_sense_ends_in_one_sentence(command, radar, tmp_path, options, sentence):
    given = [radar] if options[0] != "data=ncep_slp" else []
    small = SMALL if given else [option for option in SMALL if not option.startswith("data")]
    code, _, err = command("train", *small, *given, "model=perceiver_io", *options, f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 1 and err.count("error:") == 1 and sentence in err
    assert not (tmp_path / "run" / "checkpoints").exists()
