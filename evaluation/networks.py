"""One model under several networks of observations: each scored alone, one table beside the baselines.

Data that can be observed by other networks have `networks`, {name: the same data observed by it}; tasks whose models
read what differs between them have `reads_networks`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from torch import nn

from evaluation.evaluation import evaluate
from evaluation.summary import table, write_json

NETWORKS_FILE = "scores_by_network.json"


def score_networks(model: nn.Module, task, data, normalisation, folder: Path, **choices) -> None:
    """Writes `scores_by_network.json`, {network: the content of `scores.json`}, where the data have networks and the
    task reads them.

    choices: split, baselines, weights and max_windows of `evaluate`.
    """
    if task.reads_networks and (networks := getattr(data, "networks", None)):
        write_json(
            folder / NETWORKS_FILE,
            {
                name: evaluate(model, task, observed, normalisation, spectra=False, **choices).content()
                for name, observed in networks.items()
            },
        )


def network_table(folder: Path) -> str:
    """RMSE over all frames, a row a method and a column a network, for people; empty where nothing was written."""
    path = folder / NETWORKS_FILE
    if not path.is_file():
        return ""
    scores = json.loads(path.read_text())
    tables = []
    for variable in next(iter(scores.values())):
        columns = {name: _over_frames(content[variable]["rmse"]) for name, content in scores.items()}
        tables.append(table(f"RMSE of {variable}, all frames", columns, decimals=3))
    return "\n\n".join(tables)


def _over_frames(leads: dict[str, dict[str, float]]) -> dict[str, float]:
    """{hours: {method: rmse}} -> {method: rmse}; every frame has the same cells."""
    methods = next(iter(leads.values()))
    return {m: math.sqrt(sum(by_method[m] ** 2 for by_method in leads.values()) / len(leads)) for m in methods}
