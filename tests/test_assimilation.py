"""The task `assimilation`: windows, what observations are expected to be, dropout, scores, and input that is bad."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate

from data.analysis_normalisation import AnalysisNormalisation
from data.datasets.simulated_network import SimulatedNetwork
from data.datasets.ufs_miniature import write_miniature
from data.departures import Departures
from data.grids import LatLonGrid
from data.healpix import HEALPixGrid
from data.loading import BatchLoader
from data.normalisation import Harmonics
from data.place_in_grid import NUM_FEATURES, is_coarse, place_features
from data.sources.observations.table import Table
from evaluation.evaluation import OURS, evaluate
from models.composition import build_from_config, compose
from models.heads import residual
from models.patches import patches_of
from tests.network_examples import HOUR, SMALL, SPLIT, composed, one_step, small_network, task_of

IDS = ("batch", "frame", "channel", "platform", "type")


@pytest.fixture(scope="module")
def network() -> SimulatedNetwork:
    return small_network()


@pytest.fixture(scope="module")
def normalisation(network) -> AnalysisNormalisation:
    return task_of().fit(network)


@pytest.fixture(scope="module")
def batch(network, normalisation):
    return task_of().dataset(network, "train", normalisation).__getitems__([0, 50])


# Windows


def test_a_batch_holds_truth_reference_and_observations(network, normalisation, batch):
    dataset = task_of().dataset(network, "train", normalisation)
    target, frames = batch.targets["analysis"], dataset.windows[[0, 50]]
    assert target.values.shape == (2, 3, 1, 192) and batch.layout == task_of().layout(network) == dataset.layout
    assert np.array_equal(target.times, network.times[frames])
    assert torch.allclose(target.physical(), network.read(frames.ravel()).unflatten(0, (2, 3)), atol=1e-3)
    climatology = normalisation.climatology(network.times[frames.ravel()]).unflatten(0, (2, 3))
    assert torch.allclose(target.physical(target.reference.values), climatology, atol=1e-3)
    assert 0.5 < residual(target).std() < 2
    observations = batch.observations
    late = observations.time() - target.times[observations.batch.long(), observations.frame.long()]
    assert late.abs().max() <= 3 * HOUR and set(observations.batch.tolist()) == {0, 1}
    assert observations.features.shape == (len(observations), 50 + NUM_FEATURES)
    static = batch.inputs["static"]
    assert static.values.shape == (2, 1, 2, 192) and torch.allclose(static.physical()[0, 0], network.static, atol=1e-2)


def test_lead_hours_count_back_from_the_last_frame(network, normalisation):
    dataset = task_of(frame_steps=2).dataset(network, "test", normalisation)
    assert dataset.lead_hours == (-24.0, -12.0, 0.0)
    assert np.array_equal(dataset.windows[:, -1], dataset.base_indices) and (np.diff(dataset.base_indices) == 2).all()
    training = task_of().dataset(network, "train", normalisation)
    assert (np.diff(training.base_indices) == 1).all()


def test_without_reference_targets_are_z_scores(network, normalisation):
    dataset = task_of(reference="none").dataset(network, "train", normalisation)
    target = dataset[3].targets["analysis"]
    assert target.reference is None
    assert torch.allclose(residual(target) * normalisation.fields.scale + normalisation.fields.mean, target.physical())


def test_batches_from_a_worker_process_are_the_same(network, normalisation):
    dataset = task_of().dataset(network, "train", normalisation)
    here = next(iter(BatchLoader(dataset, batch_size=2, num_workers=0)))
    there = next(iter(BatchLoader(dataset, batch_size=2, num_workers=1)))
    assert torch.equal(here.observations.value, there.observations.value)
    assert torch.equal(here.targets["analysis"].values, there.targets["analysis"].values)


def same(one, other, path="batch"):
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=path)
    elif is_dataclass(one):
        for item in fields(one):
            same(getattr(one, item.name), getattr(other, item.name), f"{path}.{item.name}")
    elif isinstance(one, Mapping):
        assert list(one) == list(other), path
        for key, value in one.items():
            same(value, other[key], f"{path}.{key}")
    else:
        assert one == other, path


def test_a_rank_reads_its_frames_only(network, normalisation, monkeypatch):
    dataset = task_of().dataset(network, "train", normalisation)
    whole, read = dataset.__getitems__([0, 7]), []
    kept = type(network).read
    monkeypatch.setattr(type(network), "read", lambda self, frames: read.append(frames) or kept(self, frames))
    for first in range(3):
        read.clear()
        same(dataset.frames_of([0, 7], first, 1), whole.of_frames(first, 1))
        assert np.array_equal(np.concatenate(read), dataset.windows[[0, 7], first])


def test_training_may_draw_observations_of_its_own(normalisation):
    class Drawing(SimulatedNetwork):
        def drawn_observations(self, windows, random):
            rows = self.observations(windows.flatten(), (-HOUR, HOUR))
            return rows.select(random.random(len(rows)) < 0.5)

    dataset = task_of().dataset(Drawing(split=SPLIT, level=2, stations=20, sondes=4), "train", normalisation)
    first, again, other = (dataset.__getitems__(indices).observations for indices in ([1, 2], [1, 2], [2, 1]))
    assert torch.equal(first.value, again.value)
    assert not torch.equal(first.value[first.batch == 0], other.value[other.batch == 1])


# What is fitted


def test_the_climatology_is_the_regression_on_harmonics(network, normalisation):
    frames = network.training_period
    design = normalisation.harmonics.design(torch.from_numpy(network.times[frames])).numpy()
    values = network.read(frames)[:, 0].double().numpy()
    expected = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    found = normalisation.climatology(network.times[frames])[:, 0].numpy()
    assert np.abs(found - expected).max() < 0.01
    assert normalisation.anomaly_scale.item() == pytest.approx((values - expected).std(), rel=0.1)


def test_departures_take_away_climatology_limb_and_platform():
    random, rows = np.random.default_rng(0), 4000
    climatology = random.normal(size=(rows, 2))
    zenith, platform = random.uniform(0, 60, rows), random.integers(0, 2, rows)
    slant, noise = 1 / np.cos(np.deg2rad(zenith)) - 1, random.normal(size=rows)
    value = 0.3 + climatology @ [0.8, -0.4] + 0.5 * slant + 0.7 * platform + 0.2 * noise
    table = Table(
        {
            "value": value,
            "latitude": zenith,
            "longitude": zenith,
            "time": np.arange(rows),
            "channel": np.ones(rows),
            "platform": platform,
            "satellite_zenith": zenith,
            "error": np.full(rows, 0.2),
        }
    )
    found = Departures.fit(table, lambda _: climatology, num_channels=3, num_platforms=2)
    assert found.coefficients.shape == (3, 2, 6)
    assert np.allclose(found.coefficients[1, :, 1:4], [0.8, -0.4, 0.5], atol=0.03)
    assert np.allclose(found.coefficients[1, :, 0], [0.3, 1.0], atol=0.03)
    left = found(table, lambda _: climatology)
    assert np.square(left["value"] - noise).mean() < 0.01 and np.allclose(left["error"], 1, atol=0.05)
    few = table.select(np.arange(20))
    unseen = Departures.fit(few, lambda _: climatology[:20], num_channels=3, num_platforms=2)
    assert np.array_equal(unseen(few, lambda _: climatology[:20])["value"], few["value"])


def test_departures_correlate_with_what_is_to_be_found(network, batch):
    observations, target = batch.observations, residual(batch.targets["analysis"])
    cell = network.grid.cell_of(torch.stack([observations.latitude, observations.longitude], dim=-1).double())
    truth = target[observations.batch.long(), observations.frame.long(), 0, cell]
    sounder = observations.channel == 2
    assert np.corrcoef(truth[sounder], observations.value[sounder])[0, 1] > 0.5
    plain = task_of(departures=False)
    values = plain.dataset(network, "train", plain.fit(network)).__getitems__([0, 50]).observations.value
    assert np.corrcoef(truth[sounder], values[sounder])[0, 1] < 0.5


def test_the_state_survives_a_checkpoint(normalisation):
    tensors, description = normalisation.state_dict()
    again = AnalysisNormalisation.from_state(tensors, description)
    times = np.array([1_000_000_000, 1_000_050_000])
    assert torch.equal(again.climatology(times), normalisation.climatology(times))
    assert torch.equal(again.departures.coefficients, normalisation.departures.coefficients)
    assert isinstance(again.harmonics, Harmonics)


@pytest.mark.parametrize(
    "grid",
    [HEALPixGrid(2, "padxy"), LatLonGrid(np.linspace(80, -80, 8), np.arange(18) * 20.0)],
    ids=["healpix", "latlon"],
)
def test_place_features_tell_the_cells_of_a_patch_apart_and_run_smoothly(grid):
    centres = grid.coordinates
    found = place_features(grid, centres[:, 0], centres[:, 1])
    assert found.shape == (grid.num_points, NUM_FEATURES)
    patches = patches_of(grid, 2)
    cells = patches.to_images(torch.arange(grid.num_points).view(1, 1, *grid.shape).float())
    for patch in F.unfold(cells, 2, stride=2).transpose(1, 2).flatten(0, 1).long():
        inside = found[patch]
        assert (torch.cdist(inside, inside) + 9 * torch.eye(4)).min() > 1
    moved = place_features(grid, centres[:, 0] + 0.01, centres[:, 1] + 0.01)
    assert (moved - found).norm(dim=-1).max() < 0.2
    assert is_coarse(grid) and not is_coarse(HEALPixGrid(6))


# Training


def test_dropout_leaves_out_rows_platforms_and_channels(batch):
    torch.manual_seed(0)
    assert task_of().augment(batch, None) is batch
    rows = task_of(row_dropout=0.3).augment(batch, None).observations
    assert 0.6 < len(rows) / len(batch.observations) < 0.8
    torch.manual_seed(1)
    once = task_of(platform_dropout=0.5).augment(batch, None).observations
    torch.manual_seed(1)
    assert torch.equal(once.value, task_of(platform_dropout=0.5).augment(batch, None).observations.value)
    for sample in (0, 1):
        for platform in range(4):
            before, after = (
                ((item.batch == sample) & (item.platform == platform)).sum() for item in (batch.observations, once)
            )
            assert after in (0, before)
    wide = replace(batch.observations, **{name: getattr(batch.observations, name).long() for name in IDS})
    assert wide.batch.dtype != batch.observations.batch.dtype
    torch.manual_seed(1)
    again = task_of(platform_dropout=0.5).augment(replace(batch, observations=wide), None).observations
    assert torch.equal(once.value, again.value)
    channels = task_of(channel_dropout=0.5).augment(batch, None).observations
    assert 0 < len(channels) < len(batch.observations)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"frames": 0}, "task.frames=0 must be at least 1"),
        ({"window": [3, 3]}, r"task.window=\[3, 3\] must be \[first, last\] seconds"),
        ({"features": 29}, "task.features=29 is unknown; allowed: 28, 30, 50"),
        ({"huber_delta": 0.0}, "task.huber_delta=0.0 must be above 0"),
        ({"row_dropout": 1.0}, "task.row_dropout=1.0 must be at least 0 and below 1"),
        ({"query_fraction": 0.0}, "task.query_fraction=0.0 must be above 0 and at most 1"),
        ({"frame_weights": [1.0]}, r"task.frame_weights=\[1.0\] must be 3 numbers"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        task_of(**changes)


def test_data_and_task_must_fit(network, normalisation):
    with pytest.raises(ValueError, match=r"task.variable_weights names 'q'; the data has t2m"):
        task_of(variable_weights={"q": 1.0}).layout(network)
    with pytest.raises(ValueError, match="needs fields with observations, like data=simulated_network"):
        task_of().layout(SimpleNamespace(task="forecast"))
    with pytest.raises(ValueError, match=r"task.reference=persistence is unknown; allowed: climatology, none"):
        task_of(reference="persistence").dataset(network, "train", normalisation)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model/encoder=perceiver"],
        ["model/decoder=perceiver_io"],
        ["model/encoder=perceiver", "model/processor=latent_transformer", "model/decoder=perceiver_io"],
        ["data.grid=latlon", "model.patch_size=4"],
        ["data.grid=latlon", "model/encoder=video_patch", "model/decoder=perceiver_io", "model.patch_size=4"],
        ["task.reference=none", "task.features=28", "task.places=false", "task.loss=mse"],
        ["task.features=30", "task.departures=false", "task.frame_weights=[0,0,1]"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_swapped_parts_and_choices_learn(overrides):
    _, data, task, model = composed(*overrides)
    dataset = task.dataset(data, "train", task.fit(data))
    assert one_step(task, model, dataset.__getitems__([0, 9])) < 1


def test_the_miniature_of_the_archive_trains(tmp_path):
    names = {"T850", "tas", "sst"}
    from data.datasets.ufs_era5 import era5_variables, store_name

    variables = [item for item in era5_variables() if store_name(item) in names]
    written = write_miniature(tmp_path, level=1, frames=32, variables=variables, footprints=8)
    kept = [item for item in SMALL if not item.startswith("data.")]
    config = compose([*kept, "data=ufs_era5", *written.overrides])
    data, task = (instantiate(node, _convert_="all") for node in (config.data, config.task))
    torch.manual_seed(0)
    model = build_from_config(config, task.layout(data))
    normalisation = task.fit(data)
    assert one_step(task, model, task.dataset(data, "train", normalisation).__getitems__([0, 5])) < 1
    found = evaluate(model, task, data, normalisation, spectra=False)
    values = found.content()["sst"]["rmse"]["0"]
    assert np.isfinite([values[OURS], values["climatology"]]).all()


def test_the_loss_at_some_places_is_that_of_all_weighted_by_their_areas(network, batch):
    task = task_of(query_fraction=0.5)
    overrides = ["model/decoder=perceiver_io", "model.decoder.scope=local", "model.decoder.zero_head=false"]
    layout = task.layout(network)
    model = build_from_config(compose([*SMALL, *overrides]), layout).eval()
    some = task.augment(batch, model)
    places = some.places["analysis"]
    assert 0 < len(places) < 192 and some.observations is batch.observations

    target = batch.targets["analysis"]
    output = model(batch)["analysis"] - residual(target)
    losses = F.huber_loss(output, torch.zeros_like(output), reduction="none")[..., places]
    weights = target.grid.area_weights.float()[places].expand_as(losses)
    expected = ((weights * losses).sum((0, 3)) / weights.sum((0, 3))).mean()
    sums = {name: weighted for name, (weighted, _) in task.sums(model(some), some).items()}
    torch.testing.assert_close(task.combine(sums, task.total_weights([some]), layout)["loss"], expected)


# Scores


def test_an_output_of_nothing_scores_as_the_climatology(network, normalisation):
    _, _, task, model = composed()
    for parameter in model.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    found = evaluate(model, task, network, normalisation, spectra=False)
    assert found.hours == (-12.0, -6.0, 0.0) and set(found.methods) == {"ours", *task.baselines}
    content = found.content()["t2m"]["rmse"]
    assert list(content) == ["-12", "-6", "0"]
    for hours, scores in content.items():
        assert scores[OURS] == pytest.approx(scores["climatology"], rel=1e-4), hours
    dataset = task.dataset(network, "test", normalisation)
    frames = dataset.windows[:, -1]
    error = network.read(frames) - normalisation.climatology(network.times[frames])
    assert content["0"]["climatology"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-4)
