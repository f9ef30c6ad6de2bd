"""Training HealDA v2 on 8 to 512 GPUs, on paper: `python -m benchmarks scaling_model`.

Prints the tables of docs/scaling.md from the cost model in `benchmarks/costs.py` and puts them there.
"""

from __future__ import annotations

import argparse

from benchmarks.costs import (
    GB,
    H100,
    H200,
    Architecture,
    Device,
    Plan,
    comparison,
    gradient_bytes,
    memory,
    parameters_ms,
    products,
    reshard_bytes,
    step,
)
from benchmarks.measure import ROOT, insert, markdown

PAGE = ROOT / "docs" / "scaling.md"
GPUS = (8, 16, 32, 64, 128, 256, 512)
FULL = 0.9  # of the memory: the rest is fragments and what libraries take


def comparison_table(model: Architecture) -> str:
    rows = [
        [name, f"{mine:.2f}", f"{theirs:g}", f"{mine / theirs:.2f}"]
        for name, (mine, theirs) in comparison(model).items()
    ]
    return markdown(["8 x H100, one frame a GPU", "estimated, ms", "published, ms", "estimated / published"], rows)


def memory_table(model: Architecture) -> str:
    """Of one rank of 8 GPUs with one sample a group, by cp."""
    plans = [
        Plan(gpus=8, cp=cp, fsdp=fsdp, checkpoint=checkpoint)
        for cp in (1, 2, 4, 8)
        for fsdp in (False, True)
        for checkpoint in (False, True)
    ]
    header = ["cp", "FSDP", "checkpoint", "weights, gradients, AdamW, average", "copies", "activations", "total, GB"]
    return markdown([*header, "fits 80 GB", "fits 141 GB"], [_memory_row(model, plan) for plan in plans])


def _memory_row(model: Architecture, plan: Plan) -> list[str]:
    found = memory(model, plan)
    return [
        str(plan.cp),
        "yes" if plan.fsdp else "no",
        "all" if plan.checkpoint else "none",
        f"{found.state / GB:.1f}",
        f"{found.copies / GB:.1f}",
        _range(found.activations),
        _range(found.totals),
        *(_fits(found.totals, device) for device in (H100, H200)),
    ]


def _range(values: tuple[float, float]) -> str:
    return f"{values[0] / GB:.0f} to {values[1] / GB:.0f}"


def _fits(totals: tuple[float, float], device: Device) -> str:
    low, high = (total < FULL * device.memory for total in totals)
    return "yes" if high else "perhaps" if low else "no"


def weak_table(model: Architecture, device: Device) -> str:
    """Groups of 8 ranks, one sample each: the global batch grows with the GPUs."""
    first = step(model, device, Plan(gpus=GPUS[0])).total
    rows = []
    for gpus in GPUS:
        plan = Plan(gpus=gpus)
        plain, sharded = step(model, device, plan), step(model, device, Plan(gpus=gpus, fsdp=True))
        alone = plain.total - plain.exposed + plain.parameters
        rows.append(
            [
                str(gpus),
                f"{plan.dp} x {plan.cp}",
                f"{plain.forward + plain.backward:.0f}",
                f"{plain.reshard:.0f}",
                f"{plain.parameters:.0f}",
                f"{sharded.parameters:.0f}",
                f"{plain.update:.0f}",
                f"{plain.total:.0f} to {alone:.0f}",
                f"{1e3 * plan.dp / alone:.1f} to {1e3 * plan.dp / plain.total:.1f}",
                f"{first / alone:.0%}",
            ]
        )
    header = ["GPUs", "dp x cp", "compute", "reshard", "gradients, DDP", "weights and gradients, FSDP", "AdamW"]
    return f"{device.name}, ms:\n\n" + markdown([*header, "step", "samples/s", "efficiency at least"], rows)


def strong_table(model: Architecture, device: Device, samples: int = 4) -> str:
    """A fixed global batch, one sample a group, on larger and larger groups; all blocks recomputed, so that all fit."""
    rows = []
    plans = [(cp, Plan(gpus=samples * cp, cp=cp, checkpoint=True)) for cp in (1, 2, 4, 8)]
    first = step(model, device, plans[0][1])
    for cp, plan in plans:
        found = step(model, device, plan)
        speed = first.total / found.total
        rows.append(
            [
                str(plan.gpus),
                str(cp),
                f"{found.forward + found.backward:.0f}",
                f"{found.reshard:.0f}",
                f"{found.parameters:.0f}",
                f"{found.total:.0f}",
                f"{speed:.2f}",
                f"{speed / cp:.0%}",
            ]
        )
    header = ["GPUs", "cp", "compute", "reshard", "gradients", "step", "speed-up", "of linear"]
    return f"{device.name}, a global batch of {samples}, all blocks recomputed, ms:\n\n" + markdown(header, rows)


def limits(model: Architecture, device: Device) -> str:
    """Which limit binds where."""
    near = step(model, device, Plan(gpus=8))
    sent = reshard_bytes(
        ranks=8, blocks=model.depth, tokens=model.places, hidden_size=model.hidden_size, itemsize=2, backward=True
    )
    largest = Plan(gpus=GPUS[-1])
    exchanged = parameters_ms(model, device, largest)
    rows = [
        [
            "cp",
            f"{model.frames}: it divides the frames",
            f"the reshard takes {near.reshard:.0f} ms a step in a node, {1e3 * sent / device.network:.0f} ms across",
        ],
        [
            "dp",
            "the global batch: 32 GPUs for the published 4 samples at cp=8",
            f"{GPUS[-1]} GPUs take {largest.dp} samples a step; what that costs in accuracy is not modelled",
        ],
        ["gradients", "none up to 512 GPUs", f"{exchanged:.0f} ms beside a backward pass of {near.backward:.0f} ms"],
        ["memory", "80 GB: cp=8, or FSDP, or checkpointing", "see the table of memory"],
    ]
    return markdown(["what", "limit", f"at the limit ({device.name})"], rows)


def summary(model: Architecture) -> str:
    weights, attention = products(model)
    sent = reshard_bytes(
        ranks=8, blocks=model.depth, tokens=model.places, hidden_size=model.hidden_size, itemsize=2, backward=True
    )
    averaged = gradient_bytes(model.parameters, ranks=8)
    return (
        f"{model.parameters:,} parameters, {model.block_parameters:,} in a block. Forward, a block and sample: "
        f"{weights / 1e12:.2f} TFLOP in products with weights, {attention / 1e12:.2f} in spatial attention. At cp=8 a "
        f"rank sends {sent / GB:.2f} GB a step to mix frames (bf16) and {averaged / GB:.2f} GB of gradients (float32)."
    )


def report(model: Architecture) -> str:
    parts = [summary(model), comparison_table(model), memory_table(model), weak_table(model, H100)]
    parts += [weak_table(model, H200), strong_table(model, H100), limits(model, H100)]
    return "\n\n".join(parts)


def main(options: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling_model", description=__doc__.split("\n\n")[0])
    parser.add_argument("--no-store", action="store_true", help="print only")
    chosen = parser.parse_args(options)
    text = report(Architecture())
    print(text)
    if not chosen.no_store:
        insert(PAGE, "scaling_model", text)
