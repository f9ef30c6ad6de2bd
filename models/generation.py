"""Sequences that go on: tokens drawn one after another from a model of tokens, each read before the next is drawn.

What is read at each length is exact and fixed by `Window`, whether keys and values are cached or not. While the latents
fit the model's window the prefix stays as it was given and every new token is one more latent: keys and values made
before stay right, so that one token costs one query. When the window is full, `stride` of the oldest latents join the
prefix at once, the sequence loses its oldest tokens where it would be too long, and everything is read anew; the next
stride - 1 tokens then fit again. (Carrying caches over that point, as other implementations do, computes something else
than the model: latents made from a longer history, and prefix keys made with the norm of queries.) A stride of 1
always reads the most latents and reads anew for every token; half the window, the default, costs little.
Letters: B batch, n tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.sequence import Sequence, check
from models.encode_process_decode import EncodeProcessDecode


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature: of the softmax; 0 takes the most likely token. top_k: of that many most
    likely tokens only. top_p: of the fewest most likely tokens that have this probability together. None: of all.
    Raises ValueError where a value is not allowed."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(
                f"task.temperature={self.temperature} must be 0 or more; task.temperature=0 takes the most likely token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"task.top_k={self.top_k} must be at least 1; task.top_k=null draws from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"task.top_p={self.top_p} must be above 0 and at most 1; task.top_p=null draws from all tokens"
            )

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, V) -> (B,) int64. generator: on the device of the logits."""
        if self.temperature == 0:
            return logits.argmax(dim=1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, V) of a temperature above 0, after top_k and then top_p."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.softmax(dim=1).sort(dim=1, descending=True)
            beyond = ordered.cumsum(dim=1) - ordered >= self.top_p  # those before it have enough already
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
        return logits.softmax(dim=1)


@dataclass(frozen=True)
class Window:
    """What a model reads of a growing sequence: tokens start .. n - 1, of which the first prefix_len are context.

    length, latents: the most tokens and the most latents of the model. stride: see the module.
    """

    start: int
    prefix_len: int
    length: int
    latents: int
    stride: int

    def at(self, tokens: int) -> Window:
        """The window of a sequence one token longer than before: this one where it fits, else the next."""
        if tokens - self.start - self.prefix_len <= self.latents:
            return self
        kept = self.latents + 1 - self.stride
        start = max(self.start, tokens - kept - (self.length - self.latents))
        return Window(start, tokens - start - kept, self.length, self.latents, self.stride)


class TokenStream:
    """A sequence as a model of tokens reads it, and `logits` (B, V) of what comes next.

    model: in evaluation mode. prompt: what there is at first. cached: keep keys and values between tokens, where the
    processor can; the logits are the same without. Raises ValueError where the prompt does not fit the model.
    """

    def __init__(self, model: EncodeProcessDecode, prompt: Sequence, *, stride: int | None = None, cached: bool = True):
        if not model.layout.sequences:
            raise ValueError("this model predicts fields; one of tokens goes on, like that of model=perceiver_ar")
        (described,), (predicted,) = model.layout.inputs.values(), model.layout.targets.values()
        latents, stride = predicted.length, max(1, predicted.length // 2) if stride is None else stride
        if not 1 <= stride <= latents:
            raise ValueError(f"stride={stride} must be 1 to {latents}, the latents of the model")
        check(prompt, described)
        own = prompt.tokens.shape[1] - prompt.prefix_len
        if own > latents or prompt.prefix_len > described.length - latents:
            raise ValueError(
                f"a prompt of prefix_len={prompt.prefix_len} and {own} latents does not fit the model, which reads "
                f"up to {described.length - latents} and {latents}"
            )
        self.encoder, self.processor = model.encoder, model.processor
        (self.decoder,) = model.decoder.values()
        self.cached = cached and hasattr(model.processor, "reader")
        self.reader = model.processor.reader(prompt.tokens.shape[0]) if self.cached else None
        self.tokens, self.valid = prompt.filled, prompt.valid
        self.window = Window(0, prompt.prefix_len, described.length, latents, stride)
        self.logits = self._read()

    def append(self, tokens: Tensor) -> None:
        """Reads one more token a row, (B,)."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        if self.valid is not None:
            self.valid = torch.cat([self.valid, torch.ones_like(self.valid[:, :1])], dim=1)
        before, self.window = self.window, self.window.at(self.tokens.shape[1])
        goes_on = self.cached and self.window is before
        self.logits = self._read_last() if goes_on else self._read()

    def _read(self) -> Tensor:
        """Everything in the window, anew."""
        start = self.window.start
        valid = None if self.valid is None else self.valid[:, start:]
        sequence = Sequence(self.tokens[:, start:], valid, self.window.prefix_len)
        if not self.cached:
            return self._scores(self.processor(self.encoder.read(sequence)).tokens[:, 0])
        positions = sequence.positions
        self._next = positions[:, -1:] + 1
        embedded = self.encoder.embed(sequence.filled, positions)
        return self._scores(self.reader.read(embedded, positions, prefix_len=sequence.prefix_len, valid=valid))

    def _read_last(self) -> Tensor:
        """The last token, as one more latent."""
        embedded = self.encoder.embed(self.tokens[:, -1:], self._next)
        self._next = self._next + 1
        return self._scores(self.reader.append(embedded[:, 0])[:, None])

    def _scores(self, latents: Tensor) -> Tensor:
        return self.decoder.logits(latents[:, -1:])[:, 0]


@torch.inference_mode()
def generate(
    model: EncodeProcessDecode,
    prompt: Sequence,
    num_tokens: int,
    *,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    allowed: Tensor | None = None,
    stride: int | None = None,
    cached: bool = True,
) -> Tensor:
    """(B, num_tokens) int64: what follows the prompt, in evaluation mode.

    sampling: None draws from all tokens at temperature 1. generator: on the model's device; its seed decides what is
    drawn. allowed: (V,) bool, tokens that may be drawn, or None. stride, cached: see `TokenStream`.
    Raises ValueError where the prompt does not fit the model.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} must be at least 1")
    sampling = Sampling() if sampling is None else sampling
    training = model.training
    model.eval()
    try:
        stream, drawn = TokenStream(model, prompt, stride=stride, cached=cached), []
        while True:
            logits = stream.logits if allowed is None else stream.logits.masked_fill(~allowed, -torch.inf)
            drawn.append(sampling.draw(logits, generator))
            if len(drawn) == num_tokens:
                return torch.stack(drawn, dim=1)
            stream.append(drawn[-1])
    finally:
        model.train(training)
