"""The autoregressive task: tokens of a window, what is predicted from what, resumed runs, scores of ensembles."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.grids import LatLonGrid, PlanarGrid
from data.layout import Layout
from data.quantisation import Blocks
from evaluation import ensembles
from evaluation.ensembles import crps, format_scores, score_ensembles
from evaluation.run_evaluation import Choices
from evaluation.run_folder import RunFolder
from models import build
from models.generation import Sampling
from tests.tiny_run import tiny_data, tiny_loop
from training.checkpoints import read_normalisation
from training.tasks.autoregressive import AutoregressiveTask

SETTINGS = dict(
    input_frames=2,
    forecast_frames=2,
    block=2,
    bins=6,
    members=3,
    stride=3,
    head="token",
    loss="cross_entropy",
)
SMALL = ["model=perceiver_ar", "model/size=tiny", "model.hidden_size=16", "model.depth=1", "model.num_heads=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"), times=200, missing=0.02)


@pytest.fixture(scope="module")
def task():
    return AutoregressiveTask(**SETTINGS)


@pytest.fixture(scope="module")
def quantiser(task, data):
    return task.fit(data)


def model_of(task, data):
    torch.manual_seed(0)
    return build(SMALL, task.layout(data))


def test_latents_are_the_tokens_before_those_of_the_forecast(task, data, quantiser):
    dataset = task.dataset(data, "train", quantiser)
    batch = dataset.__getitems__([0, 5])
    assert batch.layout == task.layout(data) == Layout.from_dict(dataset.layout.to_dict())
    given, wanted = batch.inputs["tokens"], batch.targets["tokens"]
    frame = 8  # 2 x 4 blocks
    assert given.tokens.shape == (2, 4 * frame - 1) and wanted.tokens.shape == (2, 2 * frame)
    assert given.prefix_len == 2 * frame - 1
    assert torch.equal(given.tokens[:, 2 * frame :], wanted.tokens[:, :-1])  # a latent's target is the next input
    base = dataset.base_indices[5]
    frames = np.arange(base - 1, base + 3)
    anomalies = quantiser.normalisation.anomalies(data.read(frames), data.times[frames])
    tokens = quantiser.tokens(dataset.blocks.means(anomalies), dataset.blocks).flatten()
    assert torch.equal(torch.cat([given.tokens[1, : 2 * frame], wanted.tokens[1]]), tokens)
    later = task.dataset(data, "validation", quantiser)
    assert (np.diff(later.base_indices) >= 3).all() and len(later) < len(later.windows)


def test_what_was_not_observed_is_a_token_that_is_read_and_not_predicted(task, data, quantiser, monkeypatch):
    dataset = task.dataset(data, "train", quantiser)
    frames = dataset.frames([0])
    frames.anomalies[0, 0, 3] = frames.anomalies[0, 2, 1] = torch.nan
    monkeypatch.setattr(type(dataset), "frames", lambda *_: frames)
    batch = dataset.__getitems__([0])
    given, wanted = batch.inputs["tokens"], batch.targets["tokens"]
    assert given.tokens[0, 3] == given.tokens[0, 17] == 6 and given.valid is None
    assert not wanted.valid[0, 1] and wanted.valid.sum() == wanted.valid.numel() - 1
    model = model_of(task, data).eval()
    losses = []
    for token in (6, 2):
        tokens = wanted.tokens.clone()
        tokens[0, 1] = token
        changed = replace(batch, targets={"tokens": replace(wanted, tokens=tokens)})
        ((error, weight),) = task.sums(model(changed), changed).values()
        losses.append(task.combine({"tokens": error}, {"tokens": weight}, batch.layout)["loss"].item())
    assert losses[0] == losses[1] and weight[1] == 0
    assert abs(losses[0] - np.log(7)) < 0.1  # as good as chance


def test_training_lowers_the_loss_and_resumes(task, data, quantiser, tmp_path, monkeypatch):
    def loop_in(folder: str):
        return tiny_loop(tmp_path / folder, data, task=task, model=model_of(task, data), max_steps=8, validate_every=4)

    loop = loop_in("a")
    before = loop.validate()["val/loss"]
    loop.run(_NoTracker())
    assert loop.progress.best_score < before
    restored = read_normalisation(tmp_path / "a" / "checkpoints" / "last")
    torch.testing.assert_close(restored.edges, quantiser.edges)

    first = loop_in("b")
    step = first._step
    monkeypatch.setattr(first, "_step", lambda *given: step(*given) if first.progress.step < 6 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first.run(_NoTracker())
    again = loop_in("b")
    again.resume(tmp_path / "b" / "checkpoints" / "last")
    assert again.progress.step == 4
    again.run(_NoTracker())
    for (name, one), other in zip(loop.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


class _NoTracker:
    def log(self, step, values):
        pass


# Scores


@pytest.mark.parametrize("count", [1, 2, 7])
def test_crps_is_the_sum_over_all_pairs(count):
    torch.manual_seed(0)
    members, truth = torch.randn(count, 4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    wanted = (members - truth).abs().mean(0)
    if count > 1:
        pairs = (members[:, None] - members[None]).abs().sum((0, 1))
        wanted = wanted - pairs / (2 * count * (count - 1))
    torch.testing.assert_close(crps(members, truth), wanted)


def test_scores_are_those_of_the_members_that_were_drawn(task, data, quantiser, monkeypatch):
    dataset = task.dataset(data, "test", quantiser)
    frames = dataset.frames(range(len(dataset)))
    truth = frames.anomalies[:, 2:]
    offsets = torch.tensor([-1.0, 0.0, 4.0])[:, None, None, None]

    def drawn(dataset, tokens, members):
        """Members at fixed distances from the truth."""
        start = drawn.seen
        drawn.seen += tokens.shape[0] // members
        return truth[start : drawn.seen].nan_to_num(0.0) + offsets

    drawn.seen = 0
    monkeypatch.setattr(ensembles, "_members", drawn)
    monkeypatch.setattr(ensembles, "_SEQUENCES", 12)  # several chunks
    monkeypatch.setattr(ensembles.Draw, "__call__", lambda work, _: work.prompt.tokens)
    reads = []
    monkeypatch.setattr(
        dataset, "frames", lambda chosen: reads.append(len(chosen)) or type(dataset).frames(dataset, chosen)
    )
    found = score_ensembles(torch.nn.Linear(1, 1), dataset, members=3, sampling=Sampling())
    scale, area = quantiser.normalisation.scale.item(), dataset.blocks.weights
    assert found.bases.size == len(dataset) == drawn.seen == sum(reads) and len(reads) > 1
    spread = found.spread["t2m"]
    np.testing.assert_allclose(list(spread.values()), scale * (7 * 4 / 3) ** 0.5, rtol=1e-5)  # variance of -1, 0, 4
    rmse, score = (found.scores["t2m"][name] for name in ("rmse", "crps"))
    for lead, hours in enumerate(("6", "12")):
        np.testing.assert_allclose(rmse[hours]["ours"], scale, rtol=1e-5)  # the mean is 1 from the truth
        np.testing.assert_allclose(score[hours]["ours"], scale * (5 / 3 - 10 / 6), atol=1e-5)
        known = truth[:, lead].isfinite()
        weights = area * known
        squares = torch.where(known, truth[:, lead], 0).double().square()
        wanted = scale * ((weights * squares).sum() / weights.sum()).sqrt()
        np.testing.assert_allclose(rmse[hours]["climatology"], wanted, rtol=1e-5)
        last = (frames.anomalies[:, 1] + frames.climatology[:, 1]).nan_to_num(0.0) - frames.climatology[:, 2 + lead]
        error = torch.where(known, last - truth[:, lead], 0).double()
        wanted = scale * ((weights * error.square()).sum() / weights.sum()).sqrt()
        np.testing.assert_allclose(rmse[hours]["persistence"], wanted, rtol=1e-5)
        np.testing.assert_allclose(
            score[hours]["persistence"], scale * (weights * error.abs()).sum() / weights.sum(), rtol=1e-5
        )
        damped = quantiser.normalisation.damping[lead, 0] * frames.anomalies[:, 1].nan_to_num(0.0)
        error = torch.where(known, damped - truth[:, lead], 0).double()
        wanted = scale * ((weights * error.square()).sum() / weights.sum()).sqrt()
        np.testing.assert_allclose(rmse[hours]["damped_persistence"], wanted, rtol=1e-5)
        assert score[hours]["climatology"] < rmse[hours]["climatology"]
    assert "CRPS of t2m" in format_scores(found.scores)


def test_persistence_is_the_last_frame_in_physical_units(task, data, quantiser):
    """Differences of block climatologies are exact where all cells are there."""
    dataset = task.dataset(data, "test", quantiser)
    frames = dataset.frames([1])
    base = dataset.base_indices[1]
    values = data.read([base, base + 1])
    blocks, scale = dataset.blocks, quantiser.normalisation.scale
    whole = values.isfinite().all(0)
    wanted = (blocks.means(values[1:] / scale[:, None, None]) - blocks.means(values[:1] / scale[:, None, None]))[0]
    change = (frames.anomalies + frames.climatology)[0]
    complete = blocks.means(torch.where(whole, 0.0, torch.nan)[None])[0].isfinite()
    complete &= blocks.means((~whole)[None].float())[0] == 0
    assert complete.any()
    torch.testing.assert_close((change[2] - change[1])[complete], wanted[complete], rtol=1e-3, atol=1e-3)


def test_ensembles_are_repeatable_and_of_known_tokens(task, data, quantiser):
    dataset = task.dataset(data, "test", quantiser)
    model = model_of(task, data)
    found = [score_ensembles(model, dataset, members=3, sampling=Sampling(), max_windows=4) for _ in range(2)]
    assert found[0].scores == found[1].scores and found[0].bases.size == 4
    torch.testing.assert_close(found[0].example.members, found[1].example.members, equal_nan=True)
    other = score_ensembles(model, dataset, members=3, sampling=Sampling(), max_windows=4, seed=1)
    assert other.scores != found[0].scores


def test_an_evaluation_writes_scores_members_and_a_page(task, data, quantiser, tmp_path):
    import netCDF4

    (tmp_path / "config.yaml").write_text("model: {name: perceiver_ar}\ndata: {}\ntask: {}\n")
    found = task.evaluate(RunFolder(tmp_path), model_of(task, data), data, quantiser, Choices(max_windows=3))
    assert found.folder.name == "evaluation_3_windows" and "3 members each" in found.heading
    scores = json.loads((found.folder / "scores.json").read_text())
    assert set(scores["t2m"]["crps"]["6"]) == {"ours", "persistence", "damped_persistence", "climatology"}
    page = (found.folder / "report.html").read_text()
    assert "CRPS of t2m" in page and "maps of truth, one member and error of t2m" in page
    dataset = task.dataset(data, "test", quantiser)
    with netCDF4.Dataset(found.folder / "predictions.nc") as file:
        assert file["t2m"].dimensions == ("init_time", "lead_time", "number", "latitude", "longitude")
        members = file["t2m"][:].filled(np.nan)
        assert members.shape == (3, 2, 3, 2, 4) and file["number"].standard_name == "realization"
        first = file["init_time"][0]
    frames = dataset.frames([0])
    assert first == data.times[dataset.base_indices[0]]
    base = dataset.base_indices[0]
    physical = dataset.blocks.means(data.read([base + 1, base + 2]))
    made = dataset.physical(frames.anomalies[:, None, 2:], frames)[0, :, 0].flatten(1)
    complete = data.read([base + 1, base + 2]).isfinite().all(0)
    whole = dataset.blocks.means(complete.float()) == 1
    assert whole.any()
    torch.testing.assert_close(made[:, whole], physical[:, whole], rtol=1e-4, atol=1e-2)
    assert members.min() > made[:, whole].min() - 50 and members.max() < made[:, whole].max() + 50  # kelvin
    with pytest.raises(ValueError, match=r"weights=cos has no effect for task=autoregressive; leave it out"):
        task.evaluate(RunFolder(tmp_path), None, data, quantiser, Choices(weights="cos"))
    with pytest.raises(ValueError, match="max_windows=0 must be at least 1"):
        task.evaluate(RunFolder(tmp_path), model_of(task, data), data, quantiser, Choices(max_windows=0))
    assert not list(tmp_path.rglob(".predictions*"))


def test_blocks_lie_in_the_middle_of_their_cells():
    grid = LatLonGrid([10.0, 8.0, 6.0, 4.0, 2.0], [350.0, 355.0, 0.0])
    places = Blocks(grid, 2, torch.ones(1, 5, 3, dtype=torch.bool)).places
    np.testing.assert_allclose(places.latitude, [9, 5, 2])
    np.testing.assert_allclose(places.longitude, [352.5, 360])
    plane = Blocks(PlanarGrid.regular(4, 6), 3, torch.ones(1, 4, 6, dtype=torch.bool)).places
    np.testing.assert_allclose(plane.y, [0.5, -1.5])
    np.testing.assert_allclose(plane.x, [-1.5, 1.5])


# Errors


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"input_frames": 0}, "task.input_frames=0 must be at least 1"),
        ({"forecast_frames": 0}, "task.forecast_frames=0 must be at least 1"),
        ({"stride": 0}, "task.stride=0 must be at least 1"),
        ({"bins": 1}, "task.bins=1 must be at least 2"),
        ({"members": 1}, "task.members=1 must be at least 2"),
        ({"head": "deterministic"}, "task.head=deterministic does not predict tokens"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 or more"),
        ({"top_p": 2.0}, "top_p=2.0 must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(changes, sentence):
    with pytest.raises(ValueError) as error:
        AutoregressiveTask(**{**SETTINGS, **changes})
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_data_that_do_not_fit_are_one_sentence(data):
    with pytest.raises(ValueError, match=r"needs a series of fields, .* use task=nowcast"):
        AutoregressiveTask(**SETTINGS).layout(SimpleNamespace(task="nowcast"))
    with pytest.raises(ValueError, match=r"task\.edges\.t2m=\[0\] must be 5 increasing numbers"):
        AutoregressiveTask(**SETTINGS, edges={"t2m": [0]}).layout(data)
    with pytest.raises(ValueError, match=r"task\.block=9 must be 1 to 4 cells"):
        AutoregressiveTask(**{**SETTINGS, "block": 9}).layout(data)
