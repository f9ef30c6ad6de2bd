"""What pictures show, read from the figures themselves; drawn without a display."""

import numpy as np
import pytest
import torch

from data.grids import LatLonGrid
from data.healpix import HEALPixGrid
from evaluation import plots


@pytest.mark.parametrize(
    ("hours", "labels"),
    [
        ((6, 24, 72), ["6 h", "24 h", "72 h"]),
        ((24, 72, 288), ["1 day", "3 days", "12 days"]),
        ((730.5, 2922, 8766), ["1 month", "4 months", "12 months"]),
        ((1,), ["1 h"]),
    ],
)
def test_lead_times_in_the_unit_people_use(hours, labels):
    assert plots.lead_labels(hours) == labels


def test_maps_share_limits_and_leave_missing_cells_grey():
    grid = LatLonGrid(np.linspace(60, 30, 4), np.arange(350, 380, 5.0))
    truth = torch.arange(48.0).reshape(2, 4, 6)
    truth[:, 0, 0] = torch.nan
    figure = plots.maps(grid, "sst", "degC", truth, truth + 2, ["1 day", "2 days"], "a title")
    axes = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in axes[:4]] == [
        "truth, 1 day",
        "forecast, 1 day",
        "error, 1 day",
        "truth, 2 days",
    ]
    images = [axis.collections[0] for axis in axes]
    low, high = np.nanpercentile(truth.numpy(), [1, 99])
    for image, name in zip(images, ["truth", "forecast", "error"] * 2, strict=True):
        assert np.ma.getmaskarray(image.get_array())[0, 0] and np.ma.getmaskarray(image.get_array()).sum() == 1
        expected = (-2, 2) if name == "error" else (low, high)
        assert image.get_clim() == pytest.approx(expected)
    np.testing.assert_allclose(images[2].get_array().compressed(), 2)
    assert plots.png(figure).startswith(b"\x89PNG")


def test_labels_of_tall_figures_are_not_cut(tmp_path):
    from matplotlib.image import imread

    fields = torch.randn(8, 768, generator=torch.Generator().manual_seed(0))
    figure = plots.maps(HEALPixGrid(3, "padxy"), "t2m", "K", fields, fields + 1, list("abcdefgh"), made="analysis")
    assert [axis.get_title() for axis in figure.axes[:2]] == ["truth, a", "analysis, a"]
    assert figure.axes[-1].get_xlabel() == "analysis - truth (K)"
    (tmp_path / "maps.png").write_bytes(plots.png(figure))
    picture = imread(tmp_path / "maps.png")[..., :3]
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (border == 1).all() and (picture < 1).any()


def test_training_curves_need_a_training_loss():
    lines = [{"step": step, "train/loss": 1 / step} for step in range(1, 5)] + [{"step": 4, "val/loss": 0.5}]
    axis = plots.training_curve(lines).axes[0]
    assert axis.get_xlabel() == "step" and [len(line.get_xdata()) for line in axis.lines] == [4, 1]
    assert plots.training_curve([]) is None
