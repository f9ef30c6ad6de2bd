"""Windows, task, head and scores of nowcasts on synthetic showers, against brute force."""

import math
import re

import numpy as np
import pytest
import torch

from data.datasets.nowcast import TARGET, NowcastDataset
from data.datasets.radar import RadarData
from data.field import Field, Reference
from data.grids import PlanarGrid
from data.layout import Variable
from data.rainfall import from_log, to_log
from evaluation.nowcast.probability_thresholds import fit_probability_thresholds
from evaluation.nowcast.run import _bases
from evaluation.nowcast.scores import NowcastScores, crps_of_bins
from models.heads import CategoricalHead
from tests.radar_examples import showers, write
from training.tasks.gridded import check_series
from training.tasks.nowcast import NowcastTask

SPLIT = {"train": 0.5, "validation": 0.25, "test": 0.25}
BINS = (0.1, 0.5, 1.0, 2.0, 5.0)


def task(**options) -> NowcastTask:
    settings = dict(
        input_frames=3,
        lead_minutes=[5, 15],
        leads="one",
        crop=16,
        context=8,
        reference="extrapolation",
        head="categorical",
        loss="cross_entropy",
        bins=BINS,
    )
    return NowcastTask(**settings | options)


@pytest.fixture
def rates() -> np.ndarray:
    return showers(32)


@pytest.fixture
def data(rates, tmp_path) -> RadarData:
    return RadarData(str(write(tmp_path / "radar.nc", rates, corner=12)), split=SPLIT, window=[[8, 56], [10, 62]])


def dataset_of(data: RadarData, split: str, **options) -> NowcastDataset:
    made = task(**options)
    return made.dataset(data, split, made.fit(data))


@pytest.mark.parametrize("leads", ["one", "all"])
def test_targets_are_the_frames_at_the_lead_times_and_references_move_there(rates, data, leads):
    dataset = dataset_of(data, "test", leads=leads)
    base, corner = 27, (20, 24)
    batch = dataset.batch([base], [1 if leads == "one" else -1], np.array([corner]))
    target = batch.targets[TARGET]
    steps = [3] if leads == "one" else [1, 3]
    inside = np.s_[20:36, 24:40]
    for lead, step in enumerate(steps):
        np.testing.assert_allclose(target.physical()[0, lead, 0], rates[base + step][inside], rtol=1e-4, atol=1e-5)
        assert target.times[0, lead] == data.times[base + step]
        moving = (target.values - target.reference.values)[0, lead, 0].square().mean()
        staying = (
            (to_log(torch.from_numpy(rates[base][inside])) / target.scale - target.values[0, lead, 0]).square().mean()
        )
        assert moving < 0.5 * staying  # the showers only drift
    radar = batch.inputs["radar"]
    assert radar.values.shape == (1, 3, 1, 32, 32)
    assert radar.grid.find(target.grid) == (slice(8, 24), slice(8, 24))
    if leads == "one":  # all frames have been moved to the time of the target
        torch.testing.assert_close(radar.values[0, -1, 0, 8:24, 8:24], target.reference.values[0, 0, 0])
        assert (radar.values[0, 0] - radar.values[0, 2]).abs().mean() < 0.3 * radar.values[0, 2].abs().mean()
        assert batch.inputs["scales"].values[0, 0, -1].unique().item() == pytest.approx(15 / 60)
    else:
        arrived = batch.inputs["extrapolation"].values[0, 0, :, 8:24, 8:24]
        torch.testing.assert_close(arrived, target.reference.values[0, :, 0])


def test_without_motion_frames_are_read_as_they_were(rates, data):
    batch = dataset_of(data, "test", motion=False, reference="persistence").batch([27], [0], np.array([(20, 24)]))
    seen = from_log(batch.inputs["radar"].values[0, :, 0, 8:24, 8:24] * batch.inputs["radar"].scale)
    np.testing.assert_allclose(seen, rates[25:28, 20:36, 24:40], rtol=1e-3, atol=1e-4)
    assert list(batch.inputs) == ["radar"]


def test_training_windows_read_no_frame_of_other_splits_and_bases_lie_in_their_split(data):
    for split, first, last in (("train", 2, 15), ("validation", 16, 23), ("test", 24, 31)):
        dataset = dataset_of(data, split)
        ends = dataset.pairs[:, 0] + np.array(dataset.lead_steps)[dataset.pairs[:, 1]]
        assert (dataset.pairs[:, 0].min(), ends.max()) == (first, last)
    assert len(dataset_of(data, "test", leads="all")) == 5  # 24 to 28, with 29 to 31 left for the last


def test_a_split_in_two_ranges_keeps_to_itself(rates, tmp_path, monkeypatch):
    path = str(write(tmp_path / "radar.nc", rates, corner=12))
    at = [str(np.datetime64(int(time), "s")) for time in RadarData(path, split=SPLIT).times]
    split = {
        "train": [[at[0], at[9]], [at[16], at[25]]],
        "validation": [at[26], at[28]],
        "test": [[at[10], at[15]], [at[29], at[31]]],
    }
    data, read, seen = RadarData(path, split=split), RadarData.read, set()
    monkeypatch.setattr(RadarData, "read", lambda self, frames: (seen.update(map(int, frames)), read(self, frames))[1])
    made = task(input_frames=1)
    fitted = made.fit(data)
    assert seen and seen <= set(data.training_period.tolist())
    for base, _ in made.dataset(data, "train", fitted).pairs:
        assert {base - 2, base - 1, base} <= {-2, -1, *data.splits["train"].tolist()}
    longest = 3
    assert _bases(made.dataset(data, "test", fitted), None).tolist() == list(range(10, 15 - longest + 1))


def test_crops_of_training_are_drawn_anew_and_those_of_validation_stay(data):
    train, validation = dataset_of(data, "train"), dataset_of(data, "validation")
    assert torch.equal(_first(train, [0, 1]), _first(train, [0, 1]))
    assert not torch.equal(_first(train, [0, 1]), _first(train, [0, 2]))
    assert torch.equal(_first(validation, [3, 1]), _first(validation, [3, 2]))


def _first(dataset: NowcastDataset, indices) -> torch.Tensor:
    return dataset.__getitems__(indices).inputs["radar"].values[0]


def test_tiles_cover_the_window_and_are_what_batches_hold(data):
    dataset = dataset_of(data, "test")
    batch, corners = dataset.tiles(26, 1)
    assert corners.max(axis=0).tolist() == [48 - 16, 52 - 16] and len(corners) == 12
    places = np.add(corners, [data.rows.start, data.columns.start])
    same = dataset.batch([26] * len(corners), [1] * len(corners), places)
    for name, field in batch.inputs.items():
        torch.testing.assert_close(field.filled, same.inputs[name].filled)
    torch.testing.assert_close(batch.targets[TARGET].reference.values, same.targets[TARGET].reference.values)


def test_missing_frames_are_masked_not_dropped(rates, tmp_path):
    kept = [frame for frame in range(32) if frame not in (26, 28, 29)]
    path = write(tmp_path / "gaps.nc", rates, keep=kept)
    data = RadarData(str(path), split=SPLIT)
    dataset = dataset_of(data, "test")
    batch = dataset.batch([26, 27], [0, 0], np.array([(20, 24), (20, 24)]))
    radar, target = batch.inputs["radar"], batch.targets[TARGET]
    assert radar.frame_valid.tolist() == [[True, True, False], [True, False, True]]
    assert not radar.presence[0, 2].any() and radar.presence[1, 2].any()
    assert target.valid[0].all() and not target.valid[1].any()  # frame 27 is there, 28 is missing
    # What moves is the last frame that is there, one step further.
    apart = (target.values - target.reference.values)[0].square().mean()
    assert apart < 0.2 * target.values[0].square().mean()
    assert 29 not in dataset_of(data, "test", input_frames=2).pairs[:, 0]  # neither 28 nor 29 is there


@pytest.mark.parametrize("options", [dict(crop=60), dict(crop=40, context=16)])
def test_crops_larger_than_the_image_are_refused(data, options):
    with pytest.raises(ValueError, match=r"task.crop=\d+ with task.context=\d+ on every side is larger than the image"):
        dataset_of(data, "test", **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(bins=[0.1, 0.5, 0.5, 2]), "task.bins=[0.1, 0.5, 0.5, 2] must be increasing edges"),
        (dict(bins=[]), "task.bins=[] must be increasing edges"),
        (dict(bins=[-3, 0.5, 2]), "task.bins=[-3, 0.5, 2] must be increasing edges above 0"),
        (dict(bins=[0.5, math.nan, 2]), "task.bins=[0.5, nan, 2] must be increasing edges above 0"),
        (dict(head="classes"), "task.head=classes does not suit this task; use categorical or deterministic"),
        (dict(loss="mse"), "task.loss=mse is unknown for task.head=categorical; use task.loss=cross_entropy"),
        (dict(thresholds=[0.7]), "task.thresholds=[0.7] must be among task.bins"),
        (dict(thresholds=[2.0, 0.5]), "task.thresholds=[2.0, 0.5] must be increasing rates above 0"),
        (dict(score_minutes=[math.nan]), "task.score_minutes=[nan] must be increasing lead times"),
        (dict(leads="two"), "task.leads=two is unknown; use one of one, all"),
        (dict(motion=False), "task.reference=extrapolation needs the motion of the rain"),
        (dict(lead_minutes=[10, 5]), "task.lead_minutes=[10, 5] must be increasing lead times above 0 min"),
        (dict(fss_windows=[4]), "task.fss_windows=[4] must be odd"),
        (dict(crop=0), "task.crop=0 must be at least 1"),
        (dict(leads="all", score_minutes=[5]), "task.score_minutes needs task.leads=one"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        task(**options)


def test_lead_times_between_frames_are_refused_and_those_beyond_training_warned_of(data):
    for name in ("lead_minutes", "score_minutes"):
        sentence = f"task.{name}: 7 min is not a multiple of the data's step of 5 min; .* like task.{name}="
        with pytest.raises(ValueError, match=sentence):
            task(**{name: [7]}).layout(data)
    with pytest.raises(ValueError, match=r"task=forecast needs a series of fields, .* use task=nowcast"):
        check_series("forecast", data)
    with pytest.warns(UserWarning, match=r"beyond the trained lead times \(5 to 15 minutes\)"):
        task(score_minutes=[5, 30]).layout(data)


# The head


def random_target(presence: bool = True) -> Field:
    grid = PlanarGrid.regular(3, 4)
    rate = torch.tensor(np.random.default_rng(0).gamma(0.7, 2.0, size=(2, 2, 1, 3, 4)), dtype=torch.float32)
    valid = torch.rand(rate.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    values = to_log(rate) / 2
    return Field(
        torch.where(valid, values, torch.nan) if presence else values,
        (Variable("rain_rate"),),
        grid,
        torch.zeros(2, 2, dtype=torch.int64),
        valid=valid if presence else None,
        scale=torch.tensor(2.0),
        transform="log_rain",
        reference=Reference(torch.full_like(values, torch.nan), torch.ones(())),
    )


def test_the_categorical_loss_is_the_cross_entropy_of_bins():
    head, target = CategoricalHead(bins=list(BINS)), random_target()
    output = torch.randn(2, 2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 4, dtype=torch.float64)
    filled = torch.where(target.valid[:, :, 0, None], output, torch.nan)
    sums, totals = head.loss(filled.float(), target, weights)
    expected, weight = np.zeros(2), np.zeros(2)
    logits = output.detach().float().double().numpy()
    for sample, lead, row, column in np.ndindex(2, 2, 3, 4):
        if not target.valid[sample, lead, 0, row, column]:
            continue
        rate = float(target.physical()[sample, lead, 0, row, column])
        chosen = sum(rate >= edge for edge in BINS)
        scores = logits[sample, lead, :, row, column]
        expected[lead] += float(weights[row, column]) * (np.log(np.exp(scores).sum()) - scores[chosen])
        weight[lead] += float(weights[row, column])
    np.testing.assert_allclose(sums[:, 0].detach(), expected, rtol=1e-5)
    np.testing.assert_allclose(totals[:, 0], weight, rtol=1e-5)
    sums.sum().backward()
    assert torch.isfinite(output.grad).all() and output.grad.any()
    assert not torch.where(target.valid[:, :, 0, None], 0.0, output.grad).any()


@pytest.mark.parametrize("scale", [0.61, 1.0, 1.243, 3.3])
def test_rates_on_an_edge_reach_it_whatever_they_were_divided_by(scale):
    head, rates = CategoricalHead(bins=[0.5, 2.0, 20.0]), torch.tensor([0.5, 2.0, 20.0])
    values = (to_log(rates) / scale).reshape(1, 1, 1, 1, 3)
    described = {"scale": torch.tensor(scale), "transform": "log_rain"}
    target = Field(values, (Variable("rain_rate"),), PlanarGrid.regular(1, 3), torch.zeros(1, 1).long(), **described)
    output = torch.full((1, 1, 4, 1, 3), -30.0)
    output[0, 0, [1, 2, 3], 0, [0, 1, 2]] = 30.0  # sure of the bins that begin at these rates
    assert head.loss(output, target)[0].item() < 1e-6


def test_points_and_probabilities_of_a_categorical_forecast():
    head = CategoricalHead(bins=[1.0, 4.0])
    chances = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.4, 0.3], [0.1, 0.3, 0.6]])  # three pixels
    probabilities = chances.T.reshape(1, 1, 1, 3, 3)
    assert head.point(probabilities, torch.tensor([0.5, 0.5])).flatten().tolist() == [0.0, 2.0, 5.0]
    assert head.point(probabilities, torch.tensor([0.5, 0.25])).flatten().tolist() == [0.0, 5.0, 5.0]
    by_lead = torch.tensor([[0.5, 0.5], [0.1, 0.1]])
    assert head.point(probabilities.expand(1, 2, -1, -1, -1), by_lead)[0, :, 0].tolist() == [[0, 2, 5], [5, 5, 5]]
    target = random_target(presence=False)
    prediction = head.predict(torch.randn(2, 2, 3, 3, 4), target)
    assert prediction.probabilities.shape == (2, 2, 1, 3, 3, 4)
    torch.testing.assert_close(prediction.probabilities.sum(3), torch.ones(2, 2, 1, 3, 4))
    assert prediction.point.transform is None and set(prediction.point.values.unique().tolist()) <= {0.0, 2.0, 5.0}


# Scores


def test_scores_agree_with_brute_force():
    random = np.random.default_rng(0)
    scores = NowcastScores(2, thresholds=(0.5, 2.0), fss_windows=(3,))
    windows = []
    for _ in range(3):
        truth, made = random.gamma(0.5, 2.0, (2, 2, 9, 8))
        valid = random.random((2, 9, 8)) < 0.8
        windows.append((made, truth, valid))
        hidden = torch.from_numpy(np.where(valid, truth, np.nan))
        scores.update(torch.from_numpy(made), scores.observed(hidden, torch.from_numpy(valid)))
    found = scores.values()
    for lead in range(2):
        made, truth, valid = (np.stack([window[item][lead] for window in windows]) for item in range(3))
        error = (made - truth)[valid]
        assert found["mae"][lead] == pytest.approx(np.abs(error).mean())
        assert found["crps"][lead] == pytest.approx(np.abs(error).mean())
        assert found["rmse"][lead] == pytest.approx(np.sqrt((error**2).mean()))
        assert found["bias"][lead] == pytest.approx(error.mean())
        for threshold in (0.5, 2.0):
            hit, seen = (made >= threshold) & valid, (truth >= threshold) & valid
            assert found[f"csi_{threshold:g}"][lead] == pytest.approx((hit & seen).sum() / (hit | seen).sum())
            shares = [_brute_shares(event) for event in (hit, seen)]
            apart, most = ((shares[0] - shares[1]) ** 2).sum(), sum((share**2).sum() for share in shares)
            assert found[f"fss_{threshold:g}_3px"][lead] == pytest.approx(1 - apart / most)


def _brute_shares(events: np.ndarray) -> np.ndarray:
    shares = np.zeros(events.shape)
    for window, row, column in np.ndindex(*events.shape):
        around = events[window, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        shares[window, row, column] = around.mean()
    return shares


def test_the_crps_of_bins_is_the_integral_over_the_distribution():
    values, chances = torch.tensor([0.0, 1.0, 2.5, 6.0]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    fine = np.linspace(0, 12, 120_001)
    below = np.array([chances[values <= x].sum() for x in fine[::100]]).repeat(100)[: fine.size]
    for truth in (0.0, 0.4, 2.0, 5.0, 9.0):
        expected = np.trapezoid((below - (fine >= truth)) ** 2, fine)
        found = crps_of_bins(chances.reshape(1, 4, 1, 1), values, torch.full((1, 1, 1), truth))
        assert float(found) == pytest.approx(expected, abs=2e-2)
    sure = torch.tensor([0.0, 0.0, 1.0, 0.0]).reshape(1, 4, 1, 1)
    assert float(crps_of_bins(sure, values, torch.full((1, 1, 1), 4.0))) == pytest.approx(1.5)


def test_reliability_counts_how_often_probabilities_come_true():
    scores = NowcastScores(1, thresholds=(1.0,), fss_windows=())
    random = np.random.default_rng(1)
    probability = torch.from_numpy(random.random((1, 1, 300, 300)).astype(np.float32))
    truth = torch.from_numpy((random.random((1, 300, 300)) < probability[0].numpy()).astype(np.float32) * 2)
    observed = scores.observed(truth, torch.ones_like(truth, dtype=torch.bool))
    scores.update(torch.zeros_like(truth), observed, exceedance=probability)
    found = scores.reliability()
    assert found["counts"].sum() == 90_000
    torch.testing.assert_close(found["frequency"], found["probability"], atol=0.03, rtol=0)
    torch.testing.assert_close(found["probability"][0, 0], (torch.arange(10) + 0.5).double() / 10, atol=0.01, rtol=0)


def test_probability_thresholds_are_those_of_the_best_index():
    """Where events are rare and probabilities right, the best level is about half of the F score, below one half."""
    random = np.random.default_rng(2)
    chance = torch.from_numpy(random.beta(0.3, 2.0, (1, 400, 400)).astype(np.float32))
    truth = torch.from_numpy((random.random((1, 400, 400)) < chance.numpy()).astype(np.float32))
    valid = torch.ones_like(truth, dtype=torch.bool)
    (level,) = fit_probability_thresholds([(chance[:, None], truth, valid)], [0.5], 1)[0].tolist()
    index = {}
    for candidate in np.arange(0.1, 0.6, 0.025):
        made = chance >= candidate
        hits = float((made & (truth > 0)).sum())
        index[candidate] = hits / float((made | (truth > 0)).sum())
    best = max(index.values())
    assert level < 0.45 and index[min(index, key=lambda c: abs(c - level))] > 0.995 * best
