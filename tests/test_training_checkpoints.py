"""Checkpoint folders: complete or absent, read without running code, never at the cost of an earlier one."""

import errno
import json
import os
import threading

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import LinearModel, tiny_data, tiny_loop

from training import checkpoints
from training.checkpoints import Checkpoints, load_weights, read_normalisation
from training.run_folder import last_checkpoint
from training.tracking import NoTracker


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def steps_and_links(folder):
    store = Checkpoints(folder)
    return store.steps(), os.readlink(folder / "last"), os.readlink(folder / "best")


def test_keeps_the_newest_and_the_best(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3, 4):
        store.save(step, {"a": b"x"}, best_step=1)
    assert steps_and_links(store.folder) == ([1, 3, 4], "step_00000004", "step_00000001")
    store.save(5, {"a": b"x"}, best_step=5)
    assert steps_and_links(store.folder) == ([4, 5], "step_00000005", "step_00000005")
    assert not list(store.folder.glob(".*"))


def test_saving_a_step_again_replaces_it(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(3, {"a": b"old", "b": b"old"}, best_step=3)
    store.save(3, {"a": b"new"}, best_step=3)
    assert [(path.name, path.read_bytes()) for path in store.path(3).iterdir()] == [("a", b"new")]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path / "checkpoints")
    store.save(1, {"a": b"1", "b": b"1"}, best_step=1)
    write = checkpoints._write

    def full(path, content):
        if path.name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoints, "_write", full)
    with pytest.raises(OSError, match=r"step 2 .*No space left on device.*step 1 is intact.*resume="):
        store.save(2, {"a": b"2", "b": b"2"}, best_step=2)
    assert steps_and_links(store.folder) == ([1], "step_00000001", "step_00000001")
    assert (store.path(1) / "b").read_bytes() == b"1"
    assert not list(store.folder.glob(".*"))


def test_in_the_background_one_is_written_at_a_time_and_the_last_is_waited_for(tmp_path, monkeypatch):
    write, go, writing, most = checkpoints._write, threading.Event(), [], []

    def slow(path, content):
        writing.append(path)
        most.append(len(writing))
        go.wait(10)
        write(path, content)
        writing.remove(path)

    monkeypatch.setattr(checkpoints, "_write", slow)
    store = Checkpoints(tmp_path / "checkpoints", keep=3, background=True)
    store.save(1, {"a": b"1"}, best_step=1)
    assert store.steps() == []  # training goes on meanwhile
    threading.Timer(0.05, go.set).start()
    for step in (2, 3):
        store.save(step, {"a": b"x"}, best_step=1)
        assert step - 1 in store.steps()
    store.wait()
    assert steps_and_links(store.folder) == ([1, 2, 3], "step_00000003", "step_00000001")
    assert most == [1, 1, 1]


@pytest.mark.parametrize("then", ["save", "wait"])
def test_what_goes_wrong_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch, then):
    store = Checkpoints(tmp_path / "checkpoints", background=True)
    store.save(1, {"a": b"1"}, best_step=1)
    store.wait()

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "_write", full)
    store.save(2, {"a": b"2"}, best_step=2)
    with pytest.raises(OSError, match=r"step 2 .*No space left on device.*step 1 is intact"):
        store.wait() if then == "wait" else store.save(3, {"a": b"3"}, best_step=3)
    assert steps_and_links(store.folder) == ([1], "step_00000001", "step_00000001")


def test_a_run_that_saves_in_the_background_leaves_the_same_files(data, tmp_path):
    for name, background in (("plain", False), ("background", True)):
        tiny_loop(tmp_path / name, data, keep=2, checkpoint_every=1, async_checkpoint=background).run(NoTracker())
    files = [
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
        for name in ("plain", "background")
    ]
    assert files[0] == files[1] and len(files[0]) >= 6


def test_a_file_size_limit_stops_a_run_with_its_checkpoint_kept(data, tmp_path):
    """The real thing: the kernel refuses to write past RLIMIT_FSIZE in the middle of a checkpoint."""
    import resource

    loop = tiny_loop(tmp_path, data, max_steps=4, validate_every=2)
    save, limit = loop.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited():
        if loop.progress.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        save()

    loop.save = limited
    try:
        with pytest.raises(OSError, match=r"checkpoint of step 4.*step 2 is intact"):
            loop.run(NoTracker())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2]
    load_weights(loop.model, last_checkpoint(tmp_path))


def test_recover_removes_what_a_killed_process_left(tmp_path):
    store = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        store.save(step, {"a": b"x"}, best_step=step)
    store._point("last", 2)
    (tmp_path / ".step_00000004.part").mkdir()
    (tmp_path / ".best.part").symlink_to("nowhere")
    store.recover(2, 1)
    assert steps_and_links(tmp_path) == ([1, 2], "step_00000002", "step_00000001")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "step_00000001", "step_00000002"]


def test_contents_follow_the_contract(data, tmp_path):
    loop = tiny_loop(tmp_path, data, max_steps=2, validate_every=2)
    loop.run(NoTracker())
    folder = last_checkpoint(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "ema.safetensors",
        "model.safetensors",
        "normalisation.json",
        "normalisation.safetensors",
        "training_state.pt",
    ]
    stored = json.loads((folder / "config.json").read_text())
    assert stored["format"] == 1 and {"model", "task", "layout"} <= stored.keys()
    state = torch.load(folder / "training_state.pt", weights_only=True)
    assert {"optimizer", "loader", "random", "progress", "average_updates"} <= state.keys()
    trained = load_file(folder / "model.safetensors")
    assert all(torch.equal(trained[name], value) for name, value in loop.model.state_dict().items())
    statistics, fitted = read_normalisation(folder), loop.task.fit(data)
    assert torch.equal(statistics.coefficients, fitted.coefficients)
    assert statistics.state_dict()[1] == fitted.state_dict()[1]
    model = LinearModel(loop.task.layout(data))
    load_weights(model, folder)
    assert torch.equal(model.linear.weight, loop.average.model.linear.weight)
    assert not torch.equal(model.linear.weight, loop.model.linear.weight)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "training_state.pt"])
def test_a_damaged_checkpoint_is_one_sentence(data, tmp_path, name):
    tiny_loop(tmp_path, data, max_steps=1, validate_every=1).run(NoTracker())
    file = last_checkpoint(tmp_path) / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or belongs to another model") as caught:
        tiny_loop(tmp_path / "again", data).resume(last_checkpoint(tmp_path))
    assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(ValueError, match=f"lacks {name}"):
        tiny_loop(tmp_path / "again", data).resume(last_checkpoint(tmp_path))


def test_a_state_that_would_run_code_is_refused(data, tmp_path):
    tiny_loop(tmp_path, data, max_steps=1, validate_every=1).run(NoTracker())
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    torch.save({"progress": Attack()}, last_checkpoint(tmp_path) / "training_state.pt")
    with pytest.raises(ValueError, match="damaged or belongs to another model"):
        tiny_loop(tmp_path / "again", data).resume(last_checkpoint(tmp_path))
    assert not marker.exists()


def test_weights_of_another_model_are_refused(data, tmp_path):
    tiny_loop(tmp_path, data, max_steps=1, validate_every=1).run(NoTracker())
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="belongs to another model"):
        load_weights(other, last_checkpoint(tmp_path))


def test_a_folder_without_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"resume={tmp_path} holds no checkpoint"):
        last_checkpoint(tmp_path)
