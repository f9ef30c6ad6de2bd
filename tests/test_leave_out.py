"""Simulated innovations and what is learned from them, on a made-up ocean; the real one where its files are."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.datasets import random_covariances, wc13
from data.datasets.neighbourhoods import OTHER, OWN, Neighbourhoods, Rows
from data.datasets.random_covariances import RandomCovariances, Scales, fitted, kriging, sampled
from data.datasets.wc13_innovations import KINDS, InnovationDataset, InnovationStatistics, OceanInnovations
from data.sources.observations.table import Table
from evaluation import leave_out
from evaluation.baselines import assimilation_scores
from evaluation.baselines.optimal_interpolation import ScatteredCovariance
from evaluation.leave_out import METHODS, format_scores, score_leave_out, shares
from evaluation.run_evaluation import Choices
from evaluation.run_folder import RunFolder
from models.composition import build
from training.tasks.leave_out import LeaveOutTask

PLATFORMS = ("altimeter", wc13.SURFACE_TEMPERATURE, "float")


def ocean(seed=0, size=150):
    """A table like `wc13.read()`: sea level and satellite temperature on a plane wave, with a few profiles."""
    random = np.random.default_rng(seed)
    kind = np.repeat([0, 1, 2, 3], [size, size, 12, 12])
    latitude, longitude = random.uniform(35, 40, kind.size), random.uniform(-130, -125, kind.size)
    wave = np.sin(latitude) + np.cos(longitude)
    background = 10 + np.sin(2 * latitude)
    return Table(
        {
            "value": (background + 0.3 * wave).astype(np.float32),
            "latitude": latitude,
            "longitude": longitude,
            "time": random.integers(0, 4, kind.size) * 86_400,
            "channel": np.array([0, 1, 1, 2])[kind],
            "platform": np.array([0, 1, 2, 2])[kind],
            "level": np.where(kind < 2, 30.0, random.uniform(1, 29, kind.size)),
            "error": np.full(kind.size, 0.01, np.float32),
            "background": background,
            "analysis": background + 0.25 * wave,
            "observed": background + 0.3 * wave,
        },
        {"channel": ("zeta", "temperature", "salinity"), "platform": PLATFORMS},
    )


@pytest.fixture(scope="module")
def data():
    made = OceanInnovations()
    made.__dict__["table"] = ocean()
    return made


@pytest.fixture(scope="module")
def statistics(data):
    generator = torch.Generator().manual_seed(0)
    covariances = tuple(RandomCovariances.draw(4, generator) for _ in KINDS)
    return InnovationStatistics(Scales.of(data.rows, data.always_known), covariances)


def test_neighbours_are_the_nearest_allowed_rows_of_other_blocks(data):
    rows = data.rows
    allowed = torch.rand(len(rows), generator=torch.Generator().manual_seed(1)) < 0.7
    centres = torch.tensor([0, 100, 200, 310])
    around = Neighbourhoods.around(rows, centres, allowed)
    for b, centre in enumerate(centres.tolist()):
        known = around.row[b][around.known[b]]
        assert not around.known[b, 0] and allowed[known].all() and (rows.block[known] != rows.block[centre]).all()
        own = known[rows.quantity[known] == rows.quantity[centre]]
        usable = allowed & (rows.block != rows.block[centre]) & (rows.quantity == rows.quantity[centre])
        assert len(own) == min(OWN, int(usable.sum())) and len(known) - len(own) <= OTHER
        east = rows.latitude[centre].deg2rad().cos() * (rows.longitude - rows.longitude[centre])
        far = 111.2 / 80 * torch.hypot(east, rows.latitude - rows.latitude[centre])
        far = far + (rows.time - rows.time[centre]).abs() / 2 + (rows.level - rows.level[centre]).abs() / 5
        left = usable.clone()
        left[own] = False
        if left.any():
            assert far[own].max() <= far[left].min() + 1e-9


def test_covariances_are_positive_definite_and_samples_have_them(data, statistics):
    rows, scales = data.rows, statistics.scales
    generator = torch.Generator().manual_seed(2)
    around = Neighbourhoods.around(rows, torch.arange(0, 320, 20), torch.ones(len(rows), dtype=torch.bool))
    covariances = RandomCovariances.draw(len(around), generator).jittered(1.0, generator)
    matrix = covariances.matrix(around, rows, scales)
    torch.testing.assert_close(matrix, matrix.mT)
    size = matrix.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
    assert (torch.linalg.eigvalsh(matrix) / size).min() > -1e-9
    one = matrix[:1].expand(4000, -1, -1)
    values = sampled(one, torch.full(one.shape[:2], 1e-6), generator)
    torch.testing.assert_close(values.T @ values / len(values), one[0], atol=0.15 * float(size[0]), rtol=0)


def test_kriging_is_the_conditional_mean(data, statistics):
    rows = data.rows
    allowed = torch.ones(len(rows), dtype=torch.bool)
    around = Neighbourhoods.around(rows, torch.tensor([5]), allowed)
    one = RandomCovariances.draw(1, torch.Generator().manual_seed(3))
    matrix, noise = one.matrix(around, rows, statistics.scales), one.noise_variance(around, rows, statistics.scales)
    values = torch.randn(around.row.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    values[:, 0] = torch.nan  # the centre is never read
    known = np.flatnonzero(around.known[0])
    among = matrix[0].numpy()[np.ix_(known, known)] + np.diag(noise[0].numpy()[known])
    wanted = matrix[0].numpy()[0, known] @ np.linalg.solve(among, values[0].numpy()[known])
    np.testing.assert_allclose(kriging(matrix, noise, around.known, values).item(), wanted, rtol=1e-6)


def test_fitting_finds_covariances_that_predict(data, monkeypatch):
    monkeypatch.setattr(random_covariances, "DRAWS", 12)
    rows, known = data.rows, data.always_known
    scales = Scales.of(rows, known)
    centres = torch.nonzero(known & (rows.kind == 0))[:20, 0]
    found = fitted(rows, known, centres, scales, generator=torch.Generator().manual_seed(0))
    around = Neighbourhoods.around(rows, centres, known)
    values = rows.innovation / scales.innovation[rows.quantity]

    def error(which):
        one = found.chosen(torch.tensor([which]))
        noise = one.noise_variance(around, rows, scales)
        guess = kriging(one.matrix(around, rows, scales), noise, around.known, values[around.row])
        return float((guess - values[centres]).square().mean())

    assert error(0) <= error(len(found) - 1) and error(0) < 0.3 * float(values[centres].square().mean())


def test_no_withheld_innovation_reaches_statistics_or_samples(data, statistics):
    """Changing what is withheld changes neither what is learned nor any input of the model."""
    hidden = torch.from_numpy(wc13.withheld(data.table, 0))
    other = OceanInnovations()
    changed = data.table["observed"] + np.where(hidden.numpy(), 100.0, 0.0)
    other.__dict__["table"] = data.table.with_columns(observed=changed)
    centres = torch.nonzero(hidden)[:8, 0]
    made = []
    for source in (data, other):
        assert not (source.always_known & hidden).any()
        scales = Scales.of(source.rows, source.always_known)
        torch.testing.assert_close(scales.innovation, statistics.scales.innovation, rtol=0, atol=0)
        dataset = InnovationDataset(source, "validation", statistics, reference="interpolation")
        simulated = InnovationDataset(source, "train", statistics, reference="interpolation")[7]
        made.append((dataset.real(centres, ~hidden), simulated))
    for a, b in zip(*made, strict=True):
        for name, tensor in a.observations.rows().items():
            torch.testing.assert_close(tensor, getattr(b.observations, name), rtol=0, atol=0)
        first, second = (batch.targets["innovation"].reference for batch in (a, b))
        torch.testing.assert_close((first.values, first.scale), (second.values, second.scale), rtol=0, atol=0)
        torch.testing.assert_close(a.inputs["centre"].values, b.inputs["centre"].values, rtol=0, atol=0)
    real, changed = (batch.targets["innovation"].values for batch in (made[0][0], made[1][0]))
    assert (real != changed).all()


@pytest.mark.parametrize("reference", ["interpolation", "background"])
def test_model_starts_at_its_reference_and_learns(data, statistics, reference):
    dataset = InnovationDataset(data, "train", statistics, reference=reference)
    task = LeaveOutTask(reference=reference, head="deterministic", loss="mse")
    torch.manual_seed(0)
    model = build(["experiment=wc13_leave_out", f"task.reference={reference}", "model.hidden_size=32"], data.layout)
    batch = dataset.__getitems__(range(16))
    torch.testing.assert_close(batch.observations.value, dataset.__getitems__(range(16)).observations.value)
    target = batch.targets["innovation"]
    start = model.predict(batch)["innovation"].point.values
    torch.testing.assert_close(start, target.physical(target.reference.values))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        totals = task.total_weights([batch])
        sums = {name: weighted for name, (weighted, _) in task.sums(model(batch), batch).items()}
        loss = task.combine(sums, totals, batch.layout)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_shares_are_those_of_least_squares_with_one_block_of_nothing():
    random = np.random.default_rng(0)
    predictions = torch.from_numpy(random.standard_normal((400, 2)))
    truth = predictions @ torch.tensor([0.7, 0.2], dtype=torch.float64) + 0.1 * torch.from_numpy(
        random.standard_normal(400)
    )
    ridge = float(truth.square().sum()) / 50
    wanted = torch.linalg.solve(predictions.T @ predictions + ridge * torch.eye(2), predictions.T @ truth)
    torch.testing.assert_close(shares(predictions, truth, blocks=50), wanted)
    assert (shares(predictions, -truth, blocks=50) == 0).all()


def test_scores_of_a_seed(data, statistics, monkeypatch):
    monkeypatch.setattr(random_covariances, "DRAWS", 4)
    # How its scales are tuned is tested in test_optimal_interpolation.py.
    monkeypatch.setattr(assimilation_scores, "tuned_scattered", lambda *_: ScatteredCovariance())
    dataset = InnovationDataset(data, "validation", statistics, reference="interpolation")
    model = build(["experiment=wc13_leave_out", "model.hidden_size=32"], data.layout)
    scores = score_leave_out(model, dataset, (0,))
    assert list(scores) == ["SSH", "T", "SST", "S"]
    hidden, rows = torch.from_numpy(wc13.withheld(data.table, 0)), data.rows
    for name, part in (("SSH", rows.quantity == 0), ("SST", rows.kind == 1), ("S", rows.quantity == 2)):
        found = scores[name]["rmse"]["0"]
        wanted = float(rows.innovation[part & hidden].square().mean().sqrt())
        assert set(found) == set(METHODS)
        np.testing.assert_allclose(found["background"], wanted)
        np.testing.assert_allclose(found["network alone"], found["interpolation_by_background"], rtol=1e-4)
        np.testing.assert_allclose(found["4dvar"], wanted / 6, rtol=1e-6)
    assert format_scores(scores).splitlines()[1].startswith("ours")


def test_statistics_survive_a_checkpoint(statistics):
    tensors, description = statistics.state_dict()
    restored = InnovationStatistics.from_state(tensors, description)
    torch.testing.assert_close(restored.state_dict()[0], tensors)


def test_other_data_and_references_are_refused(data, statistics):
    with pytest.raises(ValueError, match="data=wc13"):
        LeaveOutTask(reference="background", head="deterministic", loss="mse").layout(SimpleNamespace(task="forecast"))
    with pytest.raises(ValueError, match="interpolation, background"):
        InnovationDataset(data, "train", statistics, reference="truth")


@pytest.mark.parametrize(
    "chosen",
    [
        {"split": "train"},
        {"weights": "cos"},
        {"baselines": ["background"]},
        {"max_windows": 3},
        {"regions": {"a": [1]}},
    ],
    ids=lambda chosen: next(iter(chosen)),
)
def test_options_of_an_evaluation_without_effect_are_refused(data, statistics, tmp_path, chosen):
    task = LeaveOutTask(reference="background", head="deterministic", loss="mse")
    with pytest.raises(ValueError, match=f"{next(iter(chosen))}=.* has no effect for task=leave_out; leave it out"):
        task.evaluate(RunFolder(tmp_path), None, data, statistics, Choices(**chosen))
    assert not list(tmp_path.iterdir())


def test_another_checkpoint_is_scored_in_a_folder_of_its_own(data, statistics, tmp_path, monkeypatch):
    made = {"T": {"rmse": {"0": dict.fromkeys(METHODS, 0.5)}}}
    monkeypatch.setattr(leave_out, "score_leave_out", lambda *_: made)
    task = LeaveOutTask(reference="background", head="deterministic", loss="mse")
    for checkpoint, folder in (("best", tmp_path), ("last", tmp_path / "evaluation_last")):
        choices = Choices(checkpoint=checkpoint, regions={})
        assert task.evaluate(RunFolder(tmp_path), None, data, statistics, choices).files == [folder / "scores.json"]


def test_places_without_neighbours_count_with_the_typical_innovation(data, statistics):
    dataset = InnovationDataset(data, "validation", statistics, reference="background")
    rows, centre = data.rows, torch.tensor([0])
    alone = dataset.real(centre, torch.zeros(len(rows), dtype=torch.bool)).targets["innovation"]
    assert (alone.reference.scale == 1).all()
    everything = torch.ones(len(rows), dtype=torch.bool)
    around = Neighbourhoods.around(rows, centre, everything)
    own = around.row[around.known & (rows.quantity[around.row] == rows.quantity[0])]
    squares = (rows.innovation[own] / statistics.scales.innovation[rows.quantity[0]]).square()
    wanted = ((squares.sum() + 4) / (len(own) + 4)).sqrt()
    found = dataset.real(centre, everything).targets["innovation"].reference.scale
    torch.testing.assert_close(found, wanted.float().expand_as(found))


@pytest.mark.real_data
def test_real_observations_of_every_kind_are_read():
    for name in ("wc13_obs.nc", "wc13_mod.nc"):
        if not (Path(os.environ.get("DATA_DIR", "")) / name).is_file():
            pytest.skip(f"{name} is not in DATA_DIR")
    data = OceanInnovations()
    rows = data.rows
    assert isinstance(rows, Rows) and [int((rows.kind == k).sum()) for k in range(4)] == [1570, 4952, 168, 125]
    assert int(data.always_known.sum()) == 2244 and "withheld by the seeds" in data.describe()
