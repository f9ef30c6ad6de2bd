"""Pictures of nowcasts: curves of scores, reliability diagrams, tiles of maps and an animation of them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from data.grids import PlanarGrid
from evaluation.evaluation import OURS
from evaluation.plots import COLOURS, MISSING, line_style, new_figure

if TYPE_CHECKING:
    from evaluation.nowcast.run import NowcastFindings

_RATES = (0.1, 0.5, 1, 2, 4, 8, 16)  # mm/h, between the colours of a map
_SHOWN = ("radar", OURS, "lucas_kanade", "persistence")
_NAMES = {
    "lucas_kanade": "Lucas-Kanade",
    "pysteps_lucas_kanade": "Lucas-Kanade (pysteps)",
    "pysteps_s_prog": "S-PROG (pysteps)",
}
_COLUMNS = 5  # lead times in the tiled picture
_FRAME_MS = 500
_GIF_COLOURS = 128


def curves(found: NowcastFindings):
    """MAE and CRPS, then the indices of every threshold in a row of their own, against lead time, every method."""
    values = {method: scores.values() for method, scores in found.scores.items()}
    ours = found.scores[OURS]
    rows = [["mae", "crps"]]
    rows += [[name for name in values[OURS] if name.split("_")[1:2] == [f"{t:g}"]] for t in ours.thresholds]
    columns = max(3, *map(len, rows))
    figure, axes = new_figure(3.7 * columns, 2.9 * len(rows), len(rows), columns)
    for axis, name in zip(axes.flat, [name for row in rows for name in (row + [""] * columns)[:columns]], strict=True):
        if not name:
            axis.set_axis_off()
            continue
        for method, scores in values.items():
            axis.plot(found.minutes, scores[name], label=named(method), **line_style(list(values), method))
        axis.set_title(_score_named(name), fontsize=10)
        axis.set_xlabel("lead time (minutes)")
        axis.set_xticks(found.minutes if len(found.minutes) < 8 else found.minutes[1::2])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    axes[0, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", frameon=False)
    return figure


def named(method: str) -> str:
    """A method in words."""
    return _NAMES.get(method, method.replace("_", " "))


def _score_named(score: str) -> str:
    name, *about = score.upper().split("_")
    if not about:
        return f"{name} (mm/h)"
    return f"{name} of {about[0]} mm/h" + (f", {about[1].removesuffix('PX')} pixels" if about[1:] else "")


def reliability(found: NowcastFindings):
    """Observed frequency against forecast probability, a panel a threshold, a line a lead time; None without any."""
    ours = found.scores[OURS]
    if not ours.probabilistic:
        return None
    found_curves = ours.reliability()
    figure, axes = new_figure(4.2 * len(ours.thresholds), 4, 1, len(ours.thresholds))
    chosen = _spread(len(found.minutes), _COLUMNS)
    for place, (axis, threshold) in enumerate(zip(axes[0], ours.thresholds, strict=True)):
        axis.plot([0, 1], [0, 1], color="0.4", linestyle=":")
        for colour, lead in zip(COLOURS, chosen, strict=False):
            axis.plot(
                found_curves["probability"][lead, place],
                found_curves["frequency"][lead, place],
                color=colour,
                marker="o",
                markersize=4,
                label=f"{found.minutes[lead]:g} min",
            )
        axis.set_title(f"{threshold:g} mm/h or more", fontsize=10)
        axis.set_aspect("equal")
        axis.set_xlabel("forecast probability")
        axis.set_ylabel("observed frequency")
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.25)
    return figure


def tiles(found: NowcastFindings, grid: PlanarGrid):
    """Maps of one forecast: a row a method, the radar first, a column a lead time."""
    methods, chosen = _methods(found), _spread(len(found.minutes), _COLUMNS)
    height = 2.4 * grid.shape[0] / grid.shape[1]
    figure, axes = new_figure(2.4 * len(chosen), height * len(methods) + 0.8, len(methods), len(chosen))
    for row, method in enumerate(methods):
        for column, lead in enumerate(chosen):
            image = _map(axes[row, column], found.example[method][lead].numpy())
            if row == 0:
                axes[row, column].set_title(f"{found.minutes[lead]:g} minutes", fontsize=10)
            if column == 0:
                axes[row, column].set_ylabel(named(method), fontsize=10)
    figure.colorbar(image, ax=axes, location="bottom", extend="both", shrink=0.6, aspect=40, label="rain rate (mm/h)")
    return figure


def animation(found: NowcastFindings) -> bytes:
    """A GIF that runs through the lead times: radar and forecasts side by side."""
    from PIL import Image

    methods = _methods(found)
    frames = []
    for lead, minutes in enumerate(found.minutes):
        figure, axes = new_figure(3.1 * len(methods), 3.5, 1, len(methods))
        for axis, method in zip(axes[0], methods, strict=True):
            _map(axis, found.example[method][lead].numpy())
            axis.set_title(named(method), fontsize=10)
        figure.suptitle(f"{minutes:g} minutes", fontsize=11)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=70)
        frames.append(Image.open(buffer).convert("RGB"))
    colours = frames[0].quantize(_GIF_COLOURS)  # one palette, or colours would change from frame to frame
    frames = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    moving = io.BytesIO()
    frames[0].save(moving, format="GIF", save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0)
    return moving.getvalue()


def _map(axis, rates: np.ndarray):
    """Rates (H, W) in steps of colour; white where dry, grey where unknown."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    shades = ListedColormap(colormaps["YlGnBu"](np.linspace(0.22, 1, len(_RATES))))  # the lightest is not white
    colours = shades.with_extremes(under="white", over=shades(len(_RATES) - 1), bad=MISSING)
    image = axis.imshow(
        rates, norm=BoundaryNorm(_RATES, colours.N, extend="max"), cmap=colours, interpolation="nearest"
    )
    axis.set_xticks([])
    axis.set_yticks([])
    return image


def _methods(found: NowcastFindings) -> list[str]:
    return [method for method in _SHOWN if method in found.example]


def _spread(size: int, most: int) -> list[int]:
    """Indices evenly spread over a range, both ends among them."""
    return sorted({int(place) for place in np.linspace(0, size - 1, min(size, most)).round()})
