"""Perceiver AR on CPU against krasserm's: `python -m benchmarks perceiver_ar`.

A training step (forward, cross-entropy, backward; prefix dropout on) and generation with a cache, token by token after
the prompt was read, both in float32 with the same weights, in turns within one process. Before anything is timed, the
logits of the prompt and of what follows it are compared. The peer is called directly, without the loop of transformers
around it, and both take the most likely token. Peak memory is the growth of a child process's peak over its first step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from benchmarks.peers import available, provide_fairscale
from data.batch import Batch
from data.sequence import Sequence
from models import build
from models.convert import SOURCES, export
from models.convert.perceiver_ar import TOKENS
from models.encode_process_decode import EncodeProcessDecode
from models.generation import TokenStream

OURS, PEER = "ours", "krasserm"
TOLERANCE = 2e-5  # of max(1, max |logits|)


@dataclass(frozen=True)
class Case:
    """krasserm's defaults. prompt: tokens read before the first is generated; latents: how many of them are latents."""

    prompt: int = 3584
    latents: int = 1
    tokens: int = 64
    length: int = 4096
    max_latents: int = 512
    width: int = 512
    layers: int = 8
    heads: int = 8
    vocabulary: int = 262

    @property
    def config(self) -> dict:
        """The peer's `CausalSequenceModelConfig`."""
        return {
            "num_heads": self.heads,
            "num_self_attention_layers": self.layers,
            "vocab_size": self.vocabulary,
            "max_seq_len": self.length,
            "max_latents": self.max_latents,
            "num_channels": self.width,
        }


def our_model(case: Case) -> EncodeProcessDecode:
    """With the weights that convert to the peer's, as initialised."""
    weights = {
        "encoder.embedding.weight": torch.empty(case.vocabulary, case.width),
        "processor.rotary.rates": torch.empty(case.width // case.heads // 4),
    }
    source = SOURCES["perceiver_ar"]
    torch.manual_seed(0)
    return build(source.overrides(case.config, weights), source.layout(case.config, weights, 1))


def peer_model(case: Case) -> nn.Module:
    provide_fairscale()
    from perceiver.model.core import CausalSequenceModelConfig
    from perceiver.model.core.modules import CausalSequenceModel

    torch.manual_seed(0)
    return CausalSequenceModel(CausalSequenceModelConfig.create(**case.config))


def _tokens(case: Case, count: int) -> Tensor:
    return torch.randint(case.vocabulary, (1, count), generator=torch.Generator().manual_seed(1))


# A training step


def training_step(name: str, model: nn.Module, case: Case) -> Callable[[], None]:
    """Forward and backward of the longest sequence: the prefix as long as it may be, the most latents."""
    tokens, prefix_len = _tokens(case, case.length + 1), case.length - case.max_latents
    given, wanted = tokens[:, :-1], tokens[:, prefix_len + 1 :]
    batch = None
    if name == OURS:
        inputs = {TOKENS: Sequence(given, prefix_len=prefix_len)}
        batch = Batch(inputs, {TOKENS: Sequence(wanted)}, model.layout)
    model.train()

    def step() -> None:
        logits = model(given, prefix_len=prefix_len).logits if batch is None else model(batch)[TOKENS]
        model.zero_grad(set_to_none=True)
        F.cross_entropy(logits.flatten(0, 1), wanted.flatten()).backward()

    return step


def step_growth(name: str, case: Case) -> int:
    """Bytes by which the peak memory of this process grows in its first step."""
    step = training_step(name, our_model(case) if name == OURS else peer_model(case), case)
    before = peak_rss_bytes()
    step()
    return peak_rss_bytes() - before


def train(case: Case, peers: list[str], *, rounds: int) -> dict:
    models = {OURS: our_model(case)} | {name: peer_model(case) for name in peers}
    seconds = paired_cpu_seconds(
        {name: training_step(name, model, case) for name, model in models.items()}, rounds=rounds
    )
    return {
        "cpu_ms": {name: round(1e3 * median(values), 1) for name, values in seconds.items()},
        "ratio": {peer: round(ratio(seconds[peer], seconds[OURS]), 3) for peer in peers},
    }


# Generation


class PeerStream:
    """The peer with its cache, as its wrapper of transformers calls it while the latents fit: `logits`, `append`."""

    def __init__(self, model: nn.Module, prompt: Sequence):
        self.model, self.prefix_len = model, prompt.prefix_len
        self._take(model(prompt.tokens, prefix_len=prompt.prefix_len, kv_cache=[]))

    def append(self, tokens: Tensor) -> None:
        self._take(self.model(tokens[:, None], prefix_len=self.prefix_len, kv_cache=self.cache))

    def _take(self, output) -> None:
        self.logits, self.cache = output.logits[:, -1], output.kv_cache


def streams(case: Case, peers: list[str]) -> dict[str, TokenStream | PeerStream]:
    """Each after it has read the prompt, all with our weights."""
    model = our_model(case).eval()
    prompt = Sequence(_tokens(case, case.prompt), prefix_len=case.prompt - case.latents)
    found: dict[str, TokenStream | PeerStream] = {OURS: TokenStream(model, prompt)}
    if peers:
        theirs = peer_model(case).eval()
        theirs.load_state_dict(export("perceiver_ar", model, case.config))
        found[PEER] = PeerStream(theirs, prompt)
    return found


@torch.inference_mode()
def generation(case: Case, peers: list[str], *, rounds: int) -> dict:
    """Each round generates case.tokens tokens. Raises RuntimeError where logits differ."""
    running = streams(case, peers)

    def some(name: str) -> None:
        for _ in range(case.tokens):
            running[name].append(running[name].logits.argmax(dim=1))

    seconds = paired_cpu_seconds({name: partial(some, name) for name in running}, rounds=rounds)
    error = None
    if peers:
        ours, theirs = running[OURS].logits, running[PEER].logits  # each has read the same tokens, if all agreed
        error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
        if not error <= TOLERANCE:
            raise RuntimeError(f"our logits differ from {PEER}'s by {error:.1e}, more than {TOLERANCE:g}")
    return {
        "largest_error": error,
        "tokens_per_second": {name: round(case.tokens / median(values), 1) for name, values in seconds.items()},
        "ratio": {peer: round(ratio(seconds[peer], seconds[OURS]), 3) for peer in peers},
    }


def table(rows: list[dict]) -> str:
    """Training: milliseconds of CPU time (and megabytes). Generation: tokens per second of CPU time."""
    names = list(dict.fromkeys(name for row in rows for name in (row.get("cpu_ms") or row["tokens_per_second"])))
    lines = []
    for row in rows:
        peaks = row.get("peak_mb", {})
        if "cpu_ms" in row:
            cells = {
                name: f"{ms:.0f} ms" + (f" ({peaks[name]})" if peaks else "") for name, ms in row["cpu_ms"].items()
            }
        else:
            cells = {name: f"{rate:.1f} tokens/s" for name, rate in row["tokens_per_second"].items()}
        faster = f"{row['ratio'][PEER]:.2f}x" if PEER in row["ratio"] else "-"
        smaller = f"{peaks[PEER] / peaks[OURS]:.2f}x" if PEER in peaks else "-"
        lines.append([row["case"], *(cells.get(name, "-") for name in names), faster, smaller])
    return markdown(["case", *names, "speed: ours / krasserm", "memory: krasserm / ours"], lines)


def main(options: list[str]) -> None:
    """Raises ValueError where more rounds are asked for than the peer's window has room for."""
    parser = cpu_parser("perceiver_ar", __doc__)
    parser.add_argument("--cases", nargs="+", choices=("train", "generate"), default=["train", "generate"])
    parser.add_argument("--peers", nargs="*", choices=[PEER], default=[PEER])
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of fresh processes")
    chosen, case = parser.parse_args(options), Case()
    most = (case.max_latents - case.latents) // case.tokens - 1  # and one to warm up
    if "generate" in chosen.cases and chosen.rounds > most:
        raise ValueError(
            f"--rounds={chosen.rounds} generates beyond the {case.max_latents} latents, where {PEER}'s cache is wrong; "
            f"use at most {most}"
        )
    peers = available(chosen.peers)
    result = started("perceiver_ar", options, threads=chosen.threads, packages=("perceiver-io",))
    result["setting"], rows = asdict(case), []
    for name in chosen.cases:
        row = {"case": name}
        if name == "train" and not chosen.no_memory:
            row["peak_mb"] = {
                method: round(in_child(partial(step_growth, method, case)) / 1e6) for method in (OURS, *peers)
            }
        row |= in_child(partial({"train": train, "generate": generation}[name], case, peers, rounds=chosen.rounds))
        rows.append(row)
        print(json.dumps(row), flush=True)

    def order(row: dict) -> int:
        return ("train", "generate").index(row["case"])

    finished("perceiver_ar", result, rows, table, key=("case",), order=order, store=not chosen.no_store)
