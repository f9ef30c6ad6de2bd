"""Fields as tokens: block means, bins, what is missing, and what a checkpoint keeps."""

import numpy as np
import pytest
import torch

from data.grids import LatLonGrid, Points
from data.normalisation import Normalisation
from data.quantisation import Blocks, FieldQuantiser, _quantiles
from tests.tiny_run import tiny_data

GRID = LatLonGrid(np.linspace(60, -60, 5), np.arange(6) * 60.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"), times=200, variables=("t2m", "z"), missing=0.1)


@pytest.fixture(scope="module")
def normalisation(data):
    return Normalisation.fit(data, lead_steps=[1, 2])


def test_block_means_are_weighted_by_area_and_leave_out_what_is_missing():
    torch.manual_seed(0)
    domain = torch.ones(2, 5, 6, dtype=torch.bool)
    domain[1, :2, :4] = domain[1, 4:] = False  # two blocks less, and one
    values = torch.randn(3, 2, 5, 6).masked_fill(~domain, torch.nan)
    values[0, 0, 2:4, 2:4] = torch.nan  # nothing of a block at one time
    values[1, 0, 0, 0] = torch.nan
    blocks = Blocks(GRID, 2, domain)
    assert blocks.shape == (3, 3) and blocks.num_tokens == 9 + 4
    means, weights, token = blocks.means(values), GRID.area_weights, 0
    for channel in range(2):
        for row in range(0, 5, 2):
            for column in range(0, 6, 2):
                place = (slice(row, row + 2), slice(column, column + 2))
                if not domain[channel][place].any():
                    continue
                own, area = values[:, channel][:, *place].double(), weights[place] * domain[channel][place]
                wanted = [
                    np.average(x[x.isfinite()], weights=weights[place][x.isfinite()]) if x.isfinite().any() else np.nan
                    for x in own
                ]
                np.testing.assert_allclose(means[:, token], wanted, rtol=1e-6)
                assert blocks.variable[token] == channel
                torch.testing.assert_close(blocks.weights[token], area.sum())
                token += 1
    assert token == blocks.num_tokens and means[0, 4].isnan()


def test_bins_hold_equally_many_training_values_and_stand_for_their_mean(data, normalisation):
    blocks = Blocks.of(data, 2)
    quantiser = FieldQuantiser.fit(data, normalisation, blocks, bins=5)
    frames = data.training_period
    means = blocks.means(normalisation.anomalies(data.read(frames), data.times[frames]))
    tokens = quantiser.tokens(means, blocks)
    assert quantiser.vocab_size == 6 and tokens.max() <= 5
    assert torch.equal(tokens == 5, means.isnan())
    for channel in range(2):
        own = blocks.variable == channel
        values, ids = means[:, own].flatten(), tokens[:, own].flatten()
        counts = torch.bincount(ids[ids < 5], minlength=5)
        assert counts.max() - counts.min() <= 2
        for token in range(5):
            torch.testing.assert_close(quantiser.centres[channel, token], values[ids == token].mean())
    decoded = quantiser.anomalies(tokens.clamp(max=4), blocks)
    known = means.isfinite()
    assert (decoded - means)[known].square().mean() < 0.2 * means[known].square().mean()


def test_bins_of_values_that_are_mostly_the_same_still_increase():
    rain = torch.cat([torch.zeros(900), torch.rand(100)])
    edges = _quantiles(rain, 16)
    assert edges.shape == (15,) and (edges.diff() > 0).all() and edges[0] == 0


def test_given_edges_are_kept(data, normalisation):
    blocks = Blocks.of(data, 2)
    quantiser = FieldQuantiser.fit(data, normalisation, blocks, bins=3, edges={"z": [-0.5, 40.0]})
    torch.testing.assert_close(quantiser.edges[1], torch.tensor([-0.5, 40.0]))
    assert not torch.equal(quantiser.edges[0], quantiser.edges[1])
    assert 39 < quantiser.centres[1, 2] < 41  # an empty bin: between its edges


def test_a_quantiser_survives_a_checkpoint(data, normalisation):
    quantiser = FieldQuantiser.fit(data, normalisation, Blocks.of(data, 2), bins=4)
    tensors, description = quantiser.state_dict()
    restored = FieldQuantiser.from_state(tensors, description)
    assert description["kind"] == "tokens"
    torch.testing.assert_close(restored.state_dict()[0], tensors)
    tensors["edges"] = tensors["edges"].flip(1)
    with pytest.raises(ValueError, match="bin edges of this quantiser do not increase"):
        FieldQuantiser.from_state(tensors, description)


@pytest.mark.parametrize(
    ("edges", "sentence"),
    [
        ({"z": [1.0, 1.0]}, "task.edges.z=[1.0, 1.0] must be 2 increasing numbers between the 3 bins of task.bins"),
        ({"z": [2.0, 1.0]}, "must be 2 increasing numbers"),
        ({"z": [0.0]}, "must be 2 increasing numbers"),
        ({"rain": [0.0, 1.0]}, "task.edges names 'rain'; the data has t2m, z"),
    ],
)
def test_edges_that_do_not_fit_are_one_sentence(data, normalisation, edges, sentence):
    with pytest.raises(ValueError) as error:
        FieldQuantiser.fit(data, normalisation, Blocks.of(data, 2), bins=3, edges=edges)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_grids_and_blocks_that_do_not_fit_are_one_sentence(data):
    with pytest.raises(ValueError, match=r"task\.block=5 must be 1 to 4 cells"):
        Blocks.of(data, 5)

    class Stations:
        grid = Points([[0.0, 0.0], [1.0, 1.0]])

    with pytest.raises(ValueError, match="cuts rows and columns into blocks, and the grid is points"):
        Blocks.of(Stations(), 1)
