"""Frames spread over ranks give the loss and the gradients of one rank."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from models.composition import compose
from tests.model_examples import observed_layout, tiny_layout, token_layout
from tests.rank_work import FRAMES, TINY, gradients, shared_out
from training.launch import launch
from training.parallel import check_mesh
from training.ranks import Mesh, Ranks

TRAINER = SimpleNamespace(device="cpu", timeout=60.0)
CASES = {
    "linear, causal, dropped": [
        "model.drop_path=0.3",
        "model.processor.drop_path_from=0",
        "model.processor.dropout=0.2",
        "task.row_dropout=0.2",
        "task.platform_dropout=0.2",
    ],
    "softmax in a window, recomputed": [
        "model.processor.softmax=true",
        "model.processor.window=3",
        "model.processor.checkpoint=all",
        "model.drop_path=0.3",
        "model.processor.drop_path_from=0",
        "model.processor.dropout=0.2",
    ],
    "softmax of all frames": ["model.processor.softmax=true", "model.processor.causal=false"],
    "without rotation": ["model.processor.rotary_base=null"],
    "frames encoded by a perceiver": ["model/encoder=perceiver", "model.num_latents=6"],
    "decoded by a perceiver": ["model/decoder=perceiver_io"],
    "within a disk, decoded at some places": [
        "model.processor.radius=70",
        "model/decoder=perceiver_io",
        "model.decoder.scope=local",
        "task.query_fraction=0.4",
    ],
    "frames that never meet": ["model/processor=identity"],
}


@pytest.fixture(scope="module")
def alone():
    return gradients(Ranks(), CASES, {})


@pytest.mark.parametrize(
    ("cp", "options"),
    [(2, {}), (4, {"pieces": 3}), (8, {}), (4, {"kind": "dtensor"})],
    ids=["cp=2", "cp=4 in pieces", "cp=8", "cp=4 through DTensor"],
)
def test_loss_and_gradients_equal_those_of_one_rank(alone, cp, options):
    found = launch(gradients, CASES, options, mesh=Mesh(cp=cp), trainer=TRAINER)
    for case, expected in alone.items():
        assert expected["norm"] > 0
        for name, gradient in expected.items():
            # Some gradients (of a key's bias under softmax) are 0 but for rounding.
            error, size = (found[case][name] - gradient).norm(), gradient.norm().clamp(min=1e-4 * expected["norm"])
            assert error <= 1e-5 * size, f"{case}: {name} is off by {error / size:.1e}"


def test_every_parameter_has_a_gradient(alone):
    for case, found in alone.items():
        assert all(gradient is not None for gradient in found.values()), case


@pytest.mark.parametrize(
    ("mesh", "overrides", "sentence"),
    [
        (Mesh(cp=3), [], r"cp must divide time_length=8: use 1, 2, 4 or 8 \(time_length is task.frames\)"),
        (Mesh(dp=3), ["trainer.batch_size=4"], "dp must divide trainer.batch_size=4: use 1, 2 or 4"),
        (Mesh(cp=2), ["model/processor=latent_transformer"], r"model.encoder|model.processor \(LatentTransformer\)"),
        (
            Mesh(cp=2),
            ["model/processor=identity", "model/decoder=perceiver_io", "model.decoder.dropout=0.1"],
            "set dropout to 0",
        ),
    ],
)
def test_what_would_not_be_exact_is_refused(mesh, overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_mesh(mesh, compose([*TINY, *overrides]), observed_layout(frames=FRAMES))


def test_a_forecast_is_refused_by_name():
    config = compose(["model=video_dit"])
    with pytest.raises(ValueError, match="target 'forecast' is a forecast, whose decoder reads all frames"):
        check_mesh(Mesh(cp=2), config, tiny_layout(frames=2))


@pytest.mark.slow
def test_work_of_an_evaluation_is_shared_out_in_order():
    made = launch(shared_out, mesh=Mesh(dp=2), trainer=TRAINER)
    assert [number for number, _ in made] == [0, 2, 4, 6, 8]
    assert len({process for _, process in made}) == 2


def test_sequences_have_no_frames_to_spread_and_no_weights_to_shard():
    layout = token_layout(length=9, latents=3, vocab_size=5)
    with pytest.raises(ValueError, match="cp=2 spreads frames over ranks, and a sequence of tokens has none; use dp"):
        check_mesh(Mesh(cp=2), compose(["model=perceiver_ar"]), layout)
    with pytest.raises(ValueError, match="shards weights, and a sequence goes on token by token"):
        check_mesh(Mesh(dp=2), compose(["model=perceiver_ar", "trainer.fsdp=true"]), layout)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [["+cp=2"], ["+cp=8"], ["+cp=2", "+dp=2"]], ids=" ".join)
def test_a_training_run_has_the_losses_of_one_rank(tmp_path, ranks):
    common = [
        "model=healda_v2",
        "trainer.max_steps=20",
        "trainer.precision=float32",
        "trainer.accumulate=2",
        "trainer.validation_batches=2",
        "trainer.progress=false",
        "tracking.enabled=false",
        "report=false",
        "model.depth=2",
        "model.hidden_size=32",
        "task.stride=8",
    ]
    common += (
        ["model.drop_path=0.0", "trainer.batch_size=2"] if "+dp=2" in ranks else ["model.processor.drop_path_from=0"]
    )
    logs = []
    for number, extra in enumerate(([], ranks)):
        command = [sys.executable, "train.py", *common, *extra, f"hydra.run.dir={tmp_path / str(number)}"]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert finished.returncode == 0, finished.stderr[-2000:]
        logs.append([json.loads(line) for line in (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()])
    assert len(logs[1]) == len(logs[0]) == 20
    for one, several in zip(*logs, strict=True):
        for key, value in one.items():
            assert several[key] == pytest.approx(value, rel=1e-4), (one["step"], key)
    scores = [json.loads((tmp_path / str(number) / "scores.json").read_text()) for number in range(2)]
    ours = [next(iter(score.values()))["rmse"]["0"]["ours"] for score in scores]
    assert ours[1] == pytest.approx(ours[0], rel=1e-3)
    assert torch.isfinite(torch.tensor(ours)).all()
