"""Scores at the withheld observations of `data/datasets/wc13.py`: the model beside optimal interpolation and 4D-Var.

For every seed the model's analysis is mixed with that of optimal interpolation: shares of both, fitted for each kind of
observation on those that the seed does not withhold, each predicted without its own block. Letters: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from data.datasets import wc13
from data.datasets.wc13_innovations import KINDS, TARGET, InnovationDataset
from evaluation.baselines.assimilation_scores import interpolation, scattered
from evaluation.evaluation import NETWORK, OURS

INTERPOLATION, REFERENCE = "optimal_interpolation", "interpolation_by_background"
METHODS = (OURS, NETWORK, REFERENCE, INTERPOLATION, "background", "4dvar")
_BATCH = 512


def score_leave_out(model: nn.Module, dataset: InnovationDataset, seeds: Sequence[int] = wc13.SEEDS) -> dict:
    """{quantity: {"rmse": {"0": {method: value}}}}: root mean square differences from the withheld observations, means
    over the seeds; SST is the satellite part of T. 4dvar has seen the withheld observations."""
    rows = dataset.data.rows
    found: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        hidden = torch.from_numpy(wc13.withheld(dataset.data.table, seed))
        analyses = analyses_of(model, dataset.tuned(~hidden), hidden)
        for name, part in _parts(dataset).items():
            for method in METHODS:
                errors = (analyses[method] - rows.innovation)[part & hidden]
                found.setdefault(name, {}).setdefault(method, []).append(float(errors.square().mean().sqrt()))
    return {
        name: {"rmse": {"0": {method: float(np.mean(values)) for method, values in by_method.items()}}}
        for name, by_method in found.items()
    }


def analyses_of(model: nn.Module, dataset: InnovationDataset, hidden: Tensor) -> dict[str, Tensor]:
    """method -> (R,) innovations at every row: at `hidden` (R,) rows from all others, at others without their block."""
    data, known = dataset.data, ~hidden
    rows, everything = data.rows, torch.arange(len(data.rows))
    network, reference = predicted(model, dataset, everything, known)
    interpolated = torch.zeros(len(rows), dtype=torch.float64)
    for quantity in range(len(data.variables)):
        own = rows.quantity == quantity
        fitted = interpolation(data.table.select((own & known).numpy()))
        groups = (rows.block[own & known].numpy(), rows.block[own].numpy())
        interpolated[own] = torch.from_numpy(fitted(scattered(data.table.select(own.numpy())), groups=groups))
    made = {NETWORK: network, REFERENCE: reference, INTERPOLATION: interpolated}
    analysis = torch.from_numpy(data.table["analysis"] - data.table["background"])
    made |= {OURS: mixed(made, rows, known), "background": torch.zeros_like(network), "4dvar": analysis}
    return made


@torch.inference_mode()
def predicted(model: nn.Module, dataset: InnovationDataset, centres: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(the model's innovations, those of its reference) at rows `centres` (m,) from the `allowed` (R,)."""
    scales, quantity = dataset.statistics.scales.innovation, dataset.data.rows.quantity
    device = next(model.parameters()).device
    found: tuple[list, list] = ([], [])
    model.eval()
    for rows in centres.split(_BATCH):
        batch = dataset.real(rows, allowed)
        made = model.predict(batch.to(device))[TARGET].point.values[:, 0, :, 0].cpu().double()
        found[0].append(made.gather(1, quantity[rows, None])[:, 0])
        found[1].append(batch.targets[TARGET].reference.values[:, 0, 0, 0].double() * scales[quantity[rows]])
    return torch.cat(found[0]), torch.cat(found[1])


def mixed(analyses: dict[str, Tensor], rows, known: Tensor) -> Tensor:
    """(R,) shares of the network and of optimal interpolation, none negative; the rest is background."""
    both = torch.stack([analyses[NETWORK], analyses[INTERPOLATION]], dim=1)
    result = torch.zeros_like(rows.innovation)
    for kind in range(len(KINDS)):
        own = rows.kind == kind
        seen = own & known
        result[own] = both[own] @ shares(both[seen], rows.innovation[seen], blocks=len(rows.block[seen].unique()))
    return result


def shares(predictions: Tensor, truth: Tensor, *, blocks: int) -> Tensor:
    """(m,) non-negative weights of predictions (n, m) with the least squared error, drawn towards 0 as if beside the
    `blocks` of independent errors there were one more that nothing predicts: few profiles do not decide alone."""
    from scipy.optimize import nnls

    penalty = np.sqrt(float(truth.square().sum()) / blocks) * np.eye(predictions.shape[1])
    matrix = np.concatenate([predictions.numpy(), penalty])
    weights, _ = nnls(matrix, np.concatenate([truth.numpy(), np.zeros(len(penalty))]))
    return torch.from_numpy(weights)


def _parts(dataset: InnovationDataset) -> dict[str, Tensor]:
    rows = dataset.data.rows
    parts = {}
    for quantity, variable in enumerate(dataset.data.variables):
        parts[variable.name] = rows.quantity == quantity
        if variable.name == "T":
            parts["SST"] = rows.kind == KINDS.index("SST")
    return parts


def format_scores(scores: dict) -> str:
    """One table: a row a method, a column a quantity."""
    names = list(scores)
    lines = ["rms at withheld observations".ljust(30) + "".join(name.rjust(10) for name in names)]
    for method in METHODS:
        values = [scores[name]["rmse"]["0"][method] for name in names]
        lines.append(method.ljust(30) + "".join(f"{value:10.4f}" for value in values))
    return "\n".join(lines)
