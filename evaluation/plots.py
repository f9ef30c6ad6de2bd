"""Figures of a report, drawn without a display. Colours are Okabe and Ito's, told apart with any colour vision."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from data.grids import Grid, LatLonGrid
from evaluation.evaluation import OURS, Evaluation
from evaluation.spectra import ZonalSpectra

COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OUR_COLOUR = "#D55E00"
MARKERS = "sD^vPX"
MISSING = "0.75"
DEGREES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 90)  # between the labels of a map
MONTH = 730.5  # hours, as monthly data count it
FAINT = 1e-5  # of the largest power
TITLES = {"rmse": "RMSE", "mae": "MAE", "bias": "Bias", "acc": "Anomaly correlation"}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """(figure, axes (rows, columns)) drawn in memory; needs no display and leaves pyplot's global state alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    return figure, figure.subplots(rows, columns, squeeze=False)


def png(figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def data_address(image: bytes) -> str:
    """A PNG as an address that a page can embed."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def line_style(methods: Sequence[str], method: str) -> dict:
    if method == OURS:
        return {"color": OUR_COLOUR, "marker": "o", "linewidth": 2.2, "zorder": 3}
    place = [name for name in methods if name != OURS].index(method)
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    return {"color": colour, "marker": marker, "linewidth": 1.2, "linestyle": "--", "markersize": 4.5}


def lead_axis(axis, hours: Sequence[float]) -> None:
    """Lead times along an axis of a figure, in the unit that people would give them in."""
    unit, length = _unit(hours)
    axis.set_xlabel(f"lead time ({unit})")
    axis.set_xticks(hours, [f"{value / length:g}" for value in hours])


def _unit(hours: Sequence[float]) -> tuple[str, float]:
    """(name, hours) of the unit in which people would give these lead times."""
    if any(hours) and all(abs(value / MONTH - round(value / MONTH)) < 1e-6 for value in hours):
        return "months", MONTH
    return ("days", 24.0) if max(hours) > 96 else ("h", 1.0)


def lead_labels(hours: Sequence[float]) -> list[str]:
    """Lead times with their unit, all in the same one."""
    unit, length = _unit(hours)
    return [f"{value / length:g} {unit[:-1] if value == length and length > 1 else unit}" for value in hours]


def lead_time_curves(found: Evaluation, channel: int):
    """RMSE, bias and anomaly correlation of one variable against lead time, every method."""
    variable = found.variables[channel]
    figure, axes = new_figure(11, 3.4, 1, 3)
    values = {method: scores.values() for method, scores in found.scores.items()}
    for axis, score in zip(axes[0], ("rmse", "bias", "acc"), strict=True):
        for method in found.methods:
            curve = values[method][score][0, :, channel].numpy()
            if np.isfinite(curve).any():
                axis.plot(found.hours, curve, label=method.replace("_", " "), **line_style(found.methods, method))
        lead_axis(axis, found.hours)
        axis.set_ylabel(f"{TITLES[score]}" + (f" ({variable.units or 'data units'})" if score != "acc" else ""))
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 1].axhline(0, color="0.3", linewidth=0.8)
    figure.suptitle(f"{variable.label}: scores by lead time", fontsize=12)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def maps(
    grid: Grid,
    label: str,
    units: str,
    truth: Tensor,
    forecast: Tensor,
    leads: Sequence[str],
    title: str = "",
    *,
    made: str = "forecast",
):
    """Truth, forecast and error, a row a lead time. truth, forecast: (L, *grid.shape); grey where the truth is NaN.
    made: what a forecast is called, for example analysis.

    Cells that are no rows and columns are drawn by the nearest one. Limits: the 1st and 99th percentile of the truth
    for the fields, symmetric about 0 for the error (its 99th).
    """
    if not isinstance(grid, LatLonGrid):
        grid, (truth, forecast) = _drawn(grid, truth, forecast)
    truth, forecast = truth.double().numpy(), forecast.double().numpy()
    error = forecast - truth
    seen = np.isfinite(truth)
    forecast = np.where(seen, forecast, np.nan)
    low, high = np.percentile(truth[seen], [1, 99]) if seen.any() else (0.0, 1.0)
    largest = (np.percentile(np.abs(error[np.isfinite(error)]), 99) if np.isfinite(error).any() else 0) or 1.0
    height, width = np.ptp(grid.latitude_bounds), np.ptp(grid.longitude_bounds)
    row_height = float(np.clip(3.9 * height / width, 1.4, 3.6))
    figure, axes = new_figure(12.5, row_height * len(leads) + 1.4, len(leads), 3)
    for row, lead in enumerate(leads):
        for column, (name, values) in enumerate((("truth", truth), (made, forecast), ("error", error))):
            axis = axes[row, column]
            limits = {"vmin": low, "vmax": high, "cmap": "viridis"}
            if name == "error":
                limits = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}
            axis.set_facecolor(MISSING)
            image = axis.pcolormesh(grid.longitude_bounds, grid.latitude_bounds, values[row], rasterized=True, **limits)
            axis.set_title(f"{name}, {lead}", fontsize=10)
            _degrees(axis, first=column == 0, last=row == len(leads) - 1)
            if row == len(leads) - 1 and column in (1, 2):
                where, column_count = (axes[:, :2], 2) if column == 1 else (axes[:, 2:], 1)
                text = (
                    f"{label} ({units or 'data units'})" if column == 1 else f"{made} - truth ({units or 'data units'})"
                )
                # Shares of the whole height: on tall figures the defaults leave a gap above and cut the label below.
                figure.colorbar(
                    image,
                    ax=where,
                    location="bottom",
                    extend="both",
                    aspect=20 * column_count,
                    shrink=0.75,
                    fraction=0.15 / len(leads),
                    pad=0.1 / len(leads),
                    label=text,
                )
    figure.suptitle(f"{label}, {title}" if title else label, fontsize=12)
    return figure


def _drawn(grid: Grid, *fields: Tensor) -> tuple[LatLonGrid, list[Tensor]]:
    """Fields (..., *grid.shape) on a latitude-longitude grid finer than their cells."""
    from data.regridding import Regridder

    rows = int(np.clip(2 * np.sqrt(grid.num_points), 45, 360))
    step = 180 / rows
    regular = LatLonGrid(90 - step * (np.arange(rows) + 0.5), step * (np.arange(2 * rows) + 0.5) - 180)
    regrid = Regridder(grid, regular, method="nearest")
    return regular, [regrid(field) for field in fields]


def _degrees(axis, *, first: bool, last: bool) -> None:
    """Degrees as a reader of maps expects them; labels only at the figure's edge."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    def east(value, _):
        turned = (value + 180) % 360 - 180
        return f"{abs(turned):g}°{'' if turned in (0, -180) else 'E' if turned > 0 else 'W'}"

    for scale, (low, high), most in ((axis.xaxis, axis.get_xlim(), 6), (axis.yaxis, axis.get_ylim(), 5)):
        scale.set_major_locator(MultipleLocator(next(step for step in DEGREES if abs(high - low) <= most * step)))
    axis.xaxis.set_major_formatter(FuncFormatter(east))
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{abs(value):g}°{'N' if value > 0 else 'S' if value < 0 else ''}")
    )
    axis.tick_params(labelsize=8, labelbottom=last, labelleft=first)


def spectra(found: ZonalSpectra, label: str, units: str, channel: int, leads: Sequence[str], *, made: str = "forecast"):
    """Zonal power of truth and forecast (`made`: what it is called), and their ratio, by wavenumber; a colour a lead
    time."""
    from matplotlib.ticker import LogLocator

    forecast, truth = (values[:, channel].numpy() for values in found.values())
    waves = found.wavenumbers.numpy()
    figure, axes = new_figure(11, 3.8, 1, 2)
    power, ratio = axes[0]
    # Scales that the data hardly hold (beyond a spectral model's truncation) would show the ratio of two noises.
    shown = np.where(truth > FAINT * truth[:, 1:].max(axis=1, keepdims=True), forecast / truth, np.nan)
    for lead, text in enumerate(leads):
        colour = COLOURS[lead % len(COLOURS)]
        power.loglog(waves[1:], forecast[lead, 1:], color=colour, label=f"{made}, {text}")
        ratio.semilogx(waves[1:], shown[lead, 1:], color=colour, label=text)
    power.loglog(waves[1:], truth[0, 1:], color="black", linestyle=":", linewidth=2, label="truth")
    ratio.axhline(1, color="black", linestyle=":", linewidth=2)
    power.set_ylabel(f"power ({units or 'data units'})²")
    ratio.set_ylabel(f"power of {made} / power of truth")
    ratio.set_ylim(0, max(1.3, min(2.5, float(np.nanmax(shown[:, 1:], initial=1.0)) * 1.05)))
    for axis in axes[0]:
        axis.set_xlabel("zonal wavenumber (cycles around the globe)")
        axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{label}: zonal spectra (below 1 at high wavenumbers: the {made} is too smooth)", fontsize=12)
    return figure


def training_curve(metrics: Sequence[dict], *, unit: str = "in units of the reference's error"):
    """Training and validation loss against the step, from the lines of metrics.jsonl; None where there are none."""
    train = np.array([(line["step"], line["train/loss"]) for line in metrics if "train/loss" in line]).reshape(-1, 2)
    validation = np.array([(line["step"], line["val/loss"]) for line in metrics if "val/loss" in line]).reshape(-1, 2)
    if not train.size:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(8, 3.4)
    axis = axes[0, 0]
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.plot(train[:, 0], train[:, 1], color="0.75", linewidth=0.8, label="training, every step")
    window = max(1, len(train) // 50)
    if window > 1:
        smooth = np.convolve(train[:, 1], np.ones(window) / window, mode="valid")
        axis.plot(train[window - 1 :, 0], smooth, color=COLOURS[0], label=f"training, mean of {window} steps")
    if validation.size:
        axis.plot(validation[:, 0], validation[:, 1], color=OUR_COLOUR, marker="o", markersize=4, label="validation")
        best = validation[np.nanargmin(validation[:, 1])]
        axis.annotate(f"best {best[1]:.4g}", best, xytext=(0, 10), textcoords="offset points", ha="center", fontsize=8)
    positive = np.concatenate([train[:, 1], validation[:, 1]])
    if (positive > 0).all() and positive.max() > 5 * positive.min():
        axis.set_yscale("log")
        for part in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            part("{x:g}")
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss ({unit})")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title("Training", fontsize=12)
    return figure
