"""FSDP: weights, gradients, optimiser and average sharded over ranks train as one rank does, and so do their
checkpoints on any other ranks."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import load
from models.composition import compose
from models.memory import training_bytes
from models.stored_weights import count_weights
from tests.model_examples import observed_layout
from tests.sharding_work import (
    TINY,
    TRAINER,
    assert_close,
    assert_equal,
    compared_gradients,
    metrics,
    train_with_a_small_disk,
    trained,
)
from training.checkpoints import Checkpoints
from training.export import export, main
from training.launch import launch
from training.ranks import Mesh
from training.sharding import check_sharding

FSDP = "trainer.fsdp=true"
EVERY = ("trainer.checkpoint_every=1", "trainer.keep=4")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one rank: its folder and what was left of it."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, trained(folder, *EVERY)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """The same on four ranks with sharded weights, whose checkpoints are written while it goes on."""
    folder = tmp_path_factory.mktemp("four") / "run"
    return folder, trained(folder, *EVERY, FSDP, "trainer.async_checkpoint=true", mesh=Mesh(dp=2, cp=2))


def assert_same_losses(folder: Path, expected: Path, *, tolerance: float) -> None:
    for found, other in zip(metrics(folder), metrics(expected), strict=True):
        assert found == pytest.approx(other, rel=tolerance)


def stopped(run: Path, folder: Path, step: int = 2) -> Path:
    """A copy of a run as it was when it stopped after a step."""
    shutil.copytree(run, folder, symlinks=True)
    Checkpoints(folder / "checkpoints", keep=4).recover(step, step)
    return folder


def test_a_run_on_sharded_weights_is_that_of_one_rank(one, four):
    assert_same_losses(four[0], one[0], tolerance=1e-5)
    assert_close(four[1], one[1], tolerance=1e-4)
    assert four[1]["held"] < 0.27 * one[1]["held"]


def test_resuming_on_the_same_ranks_repeats_the_run_bit_for_bit(four, tmp_path):
    folder = stopped(four[0], tmp_path / "run")
    found = trained(folder, FSDP, *EVERY, f"resume={folder}", mesh=Mesh(dp=2, cp=2))
    assert_equal(found, four[1])
    assert metrics(folder) == metrics(four[0])
    for step in (3, 4):  # written while the run waited, and while it went on
        ours, others = (sorted((run / f"checkpoints/step_{step:08d}/shards").iterdir()) for run in (folder, four[0]))
        assert [path.name for path in ours] == [path.name for path in others] and len(ours) == 4
        for path, other in zip(ours, others, strict=True):
            pieces, expected = load_file(path), load_file(other)  # the header is in no particular order
            assert pieces.keys() == expected.keys()
            assert all(torch.equal(pieces[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("source", "mesh", "sharded"),
    [("four", Mesh(), False), ("four", Mesh(cp=2), True), ("one", Mesh(dp=2), True)],
    ids=["shards on one rank", "shards on fewer ranks", "whole weights on sharded ranks"],
)
def test_resuming_on_other_ranks_continues_the_run(one, four, tmp_path, source, mesh, sharded):
    folder = stopped({"one": one, "four": four}[source][0], tmp_path / "run")
    found = trained(folder, f"trainer.fsdp={str(sharded).lower()}", *EVERY, f"resume={folder}", mesh=mesh)
    assert_same_losses(folder, one[0], tolerance=1e-5)
    assert_close(found, one[1], tolerance=1e-4)


def test_shards_load_and_export_as_one_file(four, tmp_path):
    last = four[0] / "checkpoints" / "last"
    for ema, name in ((True, "ema"), (False, "model")):
        for key, value in load(last, ema=ema).state_dict().items():
            assert torch.equal(value, four[1][name][key]), key
    assert count_weights(last) == sum(value.numel() for value in four[1]["model"].values())
    file = tmp_path / "folder" / "weights.safetensors"
    export(last, file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    stored = load_file(file)
    assert stored.keys() == four[1]["ema"].keys()
    assert all(torch.equal(stored[key], value) for key, value in four[1]["ema"].items())
    assert all(torch.equal(stored[key], value) for key, value in load(file).state_dict().items())


def test_exporting_says_what_is_wrong(four, tmp_path, capsys):
    for arguments, sentence in (
        ([four[0], tmp_path / "a.safetensors"], "is not a checkpoint"),
        ([four[0] / "checkpoints" / "last", tmp_path / "a.pt"], "must end in .safetensors"),
    ):
        with pytest.raises(SystemExit):
            main([str(argument) for argument in arguments])
        assert sentence in capsys.readouterr().err
    other = tmp_path / "other.safetensors"
    shutil.copy(next((four[0] / "checkpoints/last/shards").iterdir()), other)
    with pytest.raises(ValueError, match="does not say of what model"):
        load(other)


def damaged(four, folder: Path) -> tuple[Path, list[Path]]:
    shutil.copytree(four[0] / "checkpoints" / "step_00000004", folder)
    return folder, sorted((folder / "shards").iterdir())


@pytest.mark.parametrize("number", range(4))
def test_a_missing_shard_is_one_sentence(four, tmp_path, number):
    folder, shards = damaged(four, tmp_path / "checkpoint")
    shards[number].unlink()
    with pytest.raises(ValueError, match=r"damaged or of another model or version \(.*(missing|shape|only)") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_cut_shard_is_one_sentence(four, tmp_path):
    folder, shards = damaged(four, tmp_path / "checkpoint")
    shards[1].write_bytes(shards[1].read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged or of another model"):
        load(folder)


def test_nothing_in_a_sharded_checkpoint_runs_code(four, tmp_path):
    """The metadata file that torch.distributed.checkpoint reads by default is a pickle; here nobody looks at it."""
    folder, shards = damaged(four, tmp_path / "checkpoint")
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    for name in (".metadata", "__0_0.distcp"):
        (folder / "shards" / name).write_bytes(pickle.dumps(Attack()))
    load(folder)
    shards[0].write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="damaged"):
        load(folder)
    assert not marker.exists()


def test_a_rank_that_cannot_write_ends_the_run_with_the_earlier_checkpoint_kept(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write the checkpoint of step 2 .*File too large.*step 1 is intact"):
        launch(train_with_a_small_disk, tmp_path, [*TINY, *EVERY, FSDP], mesh=Mesh(dp=2), trainer=TRAINER)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [1] and os.readlink(checkpoints.folder / "last") == "step_00000001"


def test_gradients_of_any_model_are_those_of_whole_weights():
    errors = launch(compared_gradients, mesh=Mesh(dp=2), trainer=TRAINER)
    for case, (error, dtypes) in errors.items():
        assert error < (2e-2 if "bf16" in case else 1e-5), f"{case}: {error:.1e}"
        assert dtypes == {torch.float32}


def test_ranks_without_validation_windows_neither_wait_nor_count(tmp_path):
    """Three windows in batches of 2 a rank: the second of three ranks has one, the third none."""
    few = ("data.split.validation=[2001-01-09,2001-01-11]", "trainer.max_steps=2", "trainer.batch_size=6")
    trained(tmp_path / "one", *few)
    trained(tmp_path / "three", *few, FSDP, mesh=Mesh(dp=3))
    assert_same_losses(tmp_path / "three", tmp_path / "one", tolerance=1e-5)


def test_one_rank_has_nothing_to_shard():
    with pytest.raises(ValueError, match=r"this run has one; add \+dp=2 or \+cp=2, or use trainer.fsdp=false"):
        check_sharding(Mesh(), compose([*TINY, FSDP]).trainer)


def test_sharded_weights_need_less_memory():
    config = compose([*TINY, "model.hidden_size=512", "model.depth=8"])
    whole, shared = (
        training_bytes(config, observed_layout(frames=4), batch_size=1, sixteen_bit=True, weight_parts=parts)
        for parts in (1, 8)
    )
    assert shared < 0.5 * whole


@pytest.mark.slow
def test_the_command_trains_sharded_scores_and_resumes_on_one_rank(tmp_path):
    runs = {}
    for name, extra in (("one", []), ("four", ["+dp=2", "+cp=2", FSDP, "trainer.async_checkpoint=true"])):
        runs[name] = tmp_path / name
        _command(*TINY, *extra, "report=false", f"hydra.run.dir={runs[name]}")
    assert_same_losses(runs["four"], runs["one"], tolerance=1e-4)
    scores = [json.loads((run / "scores.json").read_text()) for run in runs.values()]
    first, second = (next(iter(score.values()))["rmse"]["0"]["ours"] for score in scores)
    assert second == pytest.approx(first, rel=1e-3)
    _command("run=" + str(runs["four"]), "log=false", "report=false", "+cp=2", script="evaluate.py")
    _command(f"resume={runs['four']}", "cp=1", "dp=1", "trainer.fsdp=false", "trainer.max_steps=6")
    assert [line["step"] for line in metrics(runs["four"])] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_sigterm_leaves_shards_from_which_the_run_goes_on_bit_for_bit(tmp_path):
    common = [*TINY, "+cp=2", FSDP, "scheduler.name=constant", "scheduler.warmup_steps=1", "report=false"]
    common += ["trainer.validate_every=1000", "trainer.checkpoint_every=1", "trainer.async_checkpoint=true"]
    run = tmp_path / "run"
    command = [sys.executable, "train.py", *common, "trainer.max_steps=1000", f"hydra.run.dir={run}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (run / "checkpoints" / "last").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and f"resume={run}" in error
    steps = len(metrics(run))
    assert Checkpoints(run / "checkpoints").steps() == [steps]
    _command(f"resume={run}", f"trainer.max_steps={steps + 2}")
    _command(*common, f"trainer.max_steps={steps + 2}", f"hydra.run.dir={tmp_path / 'whole'}")
    keys = ("step", "train/loss", "train/gradient_norm")
    found, expected = (
        [[line[key] for key in keys] for line in metrics(folder)] for folder in (run, tmp_path / "whole")
    )
    assert found == expected and len(found) == steps + 2


def _command(*arguments: str, script: str = "train.py") -> None:
    command = [sys.executable, script, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
