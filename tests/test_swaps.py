"""Every preset and every swap of parts: builds, runs, learns, and survives a checkpoint.

Pairwise by default (every pair of options occurs), the full product with `-m slow`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from models import load
from models.composition import build_from_config, compose
from tests.model_examples import tiny_batch, tiny_layout

CONF = Path(__file__).resolve().parent.parent / "conf" / "model"
TINY = [
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "model.num_latents=6",
    "model.patch_size=3",
]
CPU_ATTENTION = ("auto", "reference", "sdpa", "flash")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


PRODUCT = list(
    itertools.product(options("encoder"), options("processor"), options("decoder"), CPU_ATTENTION, ("auto", "global"))
)


def pairwise(product: list[tuple]) -> list[tuple]:
    """A greedy subset in which every pair of options of two slots still occurs."""

    def pairs(case):
        return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}

    missing, chosen = set().union(*map(pairs, product)), []
    while missing:
        best = max(product, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def overrides(encoder, processor, decoder, attention, scope) -> list[str]:
    given = [f"model/encoder={encoder}", f"model/processor={processor}", f"model/decoder={decoder}"]
    given += [f"model.attention={attention}", *TINY]
    return [*given, f"model.decoder.scope={scope}"] if decoder == "perceiver_io" and scope != "auto" else given


def exercise(given: list[str], folder: Path) -> None:
    torch.manual_seed(0)
    config = compose(given)
    layout = tiny_layout(gaps=True)
    batch = tiny_batch(layout)
    model = build_from_config(config, layout)
    for part in model.decoder.values():
        torch.nn.init.normal_(part.head.weight, std=0.1)  # a zero head would hide every gradient behind it

    output = model(batch)["forecast"]
    assert output.shape == batch.targets["forecast"].values.shape
    sums, weights = model.head.loss(output, batch.targets["forecast"])
    (sums / weights).sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("attention.key.bias"):
            continue  # shifts all logits of a row alike: its gradient is zero, absorption leaves it out
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"

    stored = {
        "format": 1,
        "model": OmegaConf.to_container(config.model, resolve=True),
        "task": OmegaConf.to_container(config.task, resolve=True),
        "layout": layout.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(stored))
    save_file(model.state_dict(), folder / "model.safetensors")
    loaded = load(folder)
    with torch.no_grad():
        expected = model.eval()(batch)["forecast"]
        assert torch.equal(loaded(replace(batch, layout=loaded.layout))["forecast"], expected)


@pytest.mark.parametrize("case", pairwise(PRODUCT), ids="-".join)
def test_pairs_of_parts(case, tmp_path):
    exercise(overrides(*case), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT, ids="-".join)
def test_all_parts(case, tmp_path):
    exercise(overrides(*case), tmp_path)


@pytest.mark.parametrize("preset", options("."))
def test_presets(preset, tmp_path):
    exercise([f"model={preset}", *TINY], tmp_path)
