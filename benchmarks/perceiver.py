"""Perceiver IO forward and backward on CPU against other implementations: `python -m benchmarks perceiver`.

Every case is timed in float32 and under bfloat16 autocast, all implementations in turns within one process, after our
outputs were compared with those peers that the same weights can be given to. Peak memory is the growth of a child
process's peak RSS over its first step. The input needs no gradient, dropout is 0. A run of some cases keeps
the stored rows of the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.cases import CASES, Case
from benchmarks.measure import (
    cpu_parser,
    finished,
    in_child,
    markdown,
    paired_cpu_seconds,
    peak_rss_bytes,
    ratio,
    started,
)
from benchmarks.peers import INSTALL, available, build_peer, supports
from data.batch import Batch
from models import build
from models.convert import SOURCES, TARGET, convert, export, token_batch
from models.convert.perceiver import token_layout

OURS = "ours"
PRECISIONS = ("float32", "bfloat16")
TOLERANCE = 2e-5  # of max(1, max |output|), float32


class Ours(nn.Module):
    """Our composed model, with the peers' outputs: Batch -> (B, queries, outputs), or (B, width) where it repeats."""

    def __init__(self, case: Case):
        super().__init__()
        self.repeats = case.repeats
        self.layout = token_layout(
            channels=case.channels, num_tokens=case.tokens, outputs=case.outputs, queries=max(1, case.queries)
        )
        self.model = build(_overrides(case), self.layout)
        if case.repeats:  # as in krasserm's, one block of weights serves all iterations, and nothing is decoded
            self.model.processor.layers = self.model.encoder.blocks[0]
            self.model.decoder = nn.ModuleDict()

    def forward(self, batch: Batch) -> Tensor:
        if self.repeats:
            return self.model.processor(self.model.encoder(batch)).tokens.mean(dim=(1, 2))
        return self.model(batch)[TARGET][:, 0].transpose(1, 2)


def _overrides(case: Case) -> list[str]:
    return [
        "model=perceiver",
        "model/size=small",
        f"model.hidden_size={case.width}",
        f"model.num_latents={case.latents}",
        f"model.num_heads={case.self_heads}",
        f"model.depth={case.self_layers}",
        f"model.mlp_ratio={case.widening}",
        "model.dropout=0",
        "model.drop_path=0",
        "model.encoder.embed=false",
        f"model.encoder.cross_heads={case.cross_heads}",
        f"model.encoder.num_cross={case.cross_layers}",
        f"model.encoder.self_per_cross={case.self_layers}",
        f"model.decoder.num_heads={case.cross_heads}",
        "model.decoder.queries=trainable",
        "model.decoder.query_residual=false",
        "model.decoder.features=0",
        "model.decoder.moment=false",
        "model.decoder.output_norm=false",
        "model.decoder.zero_head=false",
    ]


def _implementation(name: str, case: Case) -> tuple[nn.Module, Callable[[Tensor], Tensor | Batch]]:
    """The module in training mode, and what turns (B, tokens, channels) into its input."""
    torch.manual_seed(0)
    if name != OURS:
        return build_peer(name, case), lambda tokens: tokens
    ours = Ours(case).train()
    return ours, lambda tokens: token_batch(ours.layout, tokens)


def _tokens(case: Case) -> Tensor:
    return torch.randn(case.batch, case.tokens, case.channels, generator=torch.Generator().manual_seed(1))


def _step(module: nn.Module, given: Tensor | Batch, precision: str) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = module(given)
        module.zero_grad(set_to_none=True)
        output.float().square().mean().backward()

    return step


def largest_error(case: Case, peer: str, modules: dict[str, nn.Module], tokens: Tensor) -> float | None:
    """Gives ours and the peer equal weights; largest difference over max(1, |output|). None where weights do not map.

    lucidrains' MLPs are gated, so only their number of weights is the same.
    """
    ours, theirs = modules[OURS], modules[peer]
    for parameter in theirs.parameters():  # larger than as initialised, so that every layer shows in the output
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    if peer == "krasserm":
        config = {
            "num_cross_attention_layers": case.cross_layers,
            "num_self_attention_blocks": case.cross_layers,
            "num_self_attention_layers_per_block": case.self_layers,
            "decoder_cross_attention_residual": False,
        }
        if case.repeats:  # an encoder only
            names = SOURCES["perceiver_io"].names(config)
            state = {f"0.{name.removeprefix('encoder.')}": value for name, value in theirs.state_dict().items()}
            weights = {name: state[given] for name, given in names.items() if given in state}
        else:
            _, _, weights = convert("perceiver_io", theirs.state_dict(), config)
        ours.model.load_state_dict(weights)
    elif peer == "transformers":  # ours were just set from krasserm's, or are as initialised
        exported = export("transformers", ours.model, {"num_self_attends_per_block": case.self_layers})
        theirs.model.load_state_dict(exported)
    else:
        return None
    with torch.no_grad():
        wanted, given = theirs(tokens), ours(token_batch(ours.layout, tokens))
    return ((wanted - given).abs().max() / wanted.abs().max().clamp(min=1)).item()


def times(case: Case, precision: str, peers: list[str], *, rounds: int) -> dict:
    """CPU times, ratios to ours, parameters and errors of one case. Raises RuntimeError where outputs differ."""
    tokens = _tokens(case)
    built = {name: _implementation(name, case) for name in (OURS, *peers)}
    modules = {name: module for name, (module, _) in built.items()}
    errors = {peer: largest_error(case, peer, modules, tokens) for peer in peers}
    for peer, error in errors.items():
        if error is not None and not error <= TOLERANCE:
            raise RuntimeError(f"{case.name}: our output differs from {peer}'s by {error:.1e}, more than {TOLERANCE:g}")
    steps = {name: _step(module, prepare(tokens), precision) for name, (module, prepare) in built.items()}
    seconds = paired_cpu_seconds(steps, rounds=rounds)
    return {
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        "largest_error": errors,
        "cpu_ms": {name: round(1e3 * median(values), 1) for name, values in seconds.items()},
        "time_ratio": {peer: round(ratio(seconds[peer], seconds[OURS]), 3) for peer in peers},
    }


def first_step_growth(case: Case, precision: str, name: str) -> int:
    """Bytes by which the peak memory of this process grows in its first step."""
    module, prepare = _implementation(name, case)
    step = _step(module, prepare(_tokens(case)), precision)
    before = peak_rss_bytes()
    step()
    return peak_rss_bytes() - before


def table(rows: list[dict]) -> str:
    """Milliseconds of CPU time and megabytes of each implementation, and how far ahead of the best peer ours is."""
    names = list(dict.fromkeys(name for row in rows for name in row["cpu_ms"]))
    lines = []
    for row in rows:
        peaks = row["peak_mb"]
        cells = {name: f"{time:.0f}" + (f" ({peaks[name]})" if peaks else "") for name, time in row["cpu_ms"].items()}
        faster = f"{min(row['time_ratio'].values()):.2f}x" if row["time_ratio"] else "-"
        smaller = f"{min(peaks[name] for name in row['time_ratio']) / peaks[OURS]:.1f}x" if len(peaks) > 1 else "-"
        lines.append([row["case"], row["precision"], *(cells.get(name, "-") for name in names), faster, smaller])
    return markdown(["case", "precision", *names, "time: best peer / ours", "memory: best peer / ours"], lines)


def main(options: list[str]) -> None:
    parser = cpu_parser("perceiver", __doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--peers", nargs="*", choices=INSTALL, default=list(INSTALL))
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of fresh processes")
    chosen = parser.parse_args(options)
    peers = available(chosen.peers)
    packages = ("perceiver-io", "perceiver-pytorch", "transformers")
    result, rows = started("perceiver", options, threads=chosen.threads, packages=packages), []
    for case in (CASES[name] for name in chosen.cases):
        for precision in chosen.precisions:
            rivals = [peer for peer in peers if supports(peer, case)]
            row = {"case": case.name, "precision": precision, "peak_mb": {}}
            for name in [] if chosen.no_memory else [OURS, *rivals]:
                growth = in_child(partial(first_step_growth, case, precision, name))
                row["peak_mb"][name] = round(growth / 1e6)
            row |= in_child(partial(times, case, precision, rivals, rounds=chosen.rounds))
            rows.append(row)
            print(json.dumps(row), flush=True)

    def order(row: dict) -> tuple[int, int]:
        return list(CASES).index(row["case"]), PRECISIONS.index(row["precision"])

    finished("perceiver", result, rows, table, key=("case", "precision"), order=order, store=not chosen.no_store)
