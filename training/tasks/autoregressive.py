"""Autoregression: an image sequence as tokens in time order, each predicted from all before it; ensembles by sampling.

Letters: B batch, L latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from data.batch import Batch
from data.layout import Layout
from training.tasks.gridded import check_series

if TYPE_CHECKING:
    from data.datasets.gridded import GriddedData
    from data.datasets.token_windows import TokenWindows
    from data.quantisation import Blocks, FieldQuantiser
    from evaluation.run_evaluation import Choices, Findings
    from evaluation.run_folder import RunFolder
    from models.encode_process_decode import EncodeProcessDecode
    from models.generation import Sampling


class AutoregressiveTask:
    """Predicts the next token of one gridded series; a forecast is a sequence that goes on.

    input_frames: consecutive frames that a forecast reads; forecast_frames: those it writes, a step of the data apart.
    block: cells a side; the mean anomaly of a block of each variable is a token. bins: of a variable, with equally many
    training values each; edges: {variable: increasing numbers between its bins}, in standard deviations from the
    climatology, instead. members: of an ensemble. stride: steps of the data from one validation or test window to the
    next; training windows start at every one. temperature, top_k, top_p: how they are drawn
    (`models/generation.py`).
    head: token. loss: cross_entropy. Raises ValueError where a value is not allowed.
    """

    stacking = None  # forecasts are ensembles

    def __init__(
        self,
        *,
        input_frames: int,
        forecast_frames: int,
        block: int,
        bins: int,
        members: int,
        stride: int,
        head: str,
        loss: str,
        edges: Mapping[str, Sequence[float]] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ):
        from models.generation import Sampling

        counts = {"input_frames": input_frames, "forecast_frames": forecast_frames, "stride": stride}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"task.{name}={value} must be at least 1")
        if bins < 2:
            raise ValueError(f"task.bins={bins} must be at least 2")
        if members < 2:
            raise ValueError(f"task.members={members} must be at least 2, to tell how certain a forecast is")
        if head != "token":
            raise ValueError(f"task.head={head} does not predict tokens; leave it out")
        self.input_frames, self.forecast_frames = input_frames, forecast_frames
        self.block, self.bins, self.members, self.stride, self.loss_name = block, bins, members, stride, loss
        self.edges = dict(edges or {})
        self.sampling: Sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)

    # Data

    @property
    def lead_steps(self) -> tuple[int, ...]:
        return tuple(range(1, self.forecast_frames + 1))

    def blocks(self, data: GriddedData) -> Blocks:
        from data.quantisation import Blocks

        return Blocks.of(data, self.block)

    def layout(self, data: GriddedData) -> Layout:
        """What the model reads and predicts. Raises ValueError where task and data do not fit."""
        check_series("autoregressive", data)
        from data.datasets.token_windows import token_layout
        from data.quantisation import checked_edges

        checked_edges(self.edges, data.variables, self.bins)
        return token_layout(
            self.blocks(data),
            vocab_size=self.bins + 1,
            input_frames=self.input_frames,
            forecast_frames=self.forecast_frames,
        )

    def fit(self, data: GriddedData) -> FieldQuantiser:
        """Climatology, scale and bins of the training range."""
        from data.normalisation import Normalisation
        from data.quantisation import FieldQuantiser

        normalisation = Normalisation.fit(data, lead_steps=self.lead_steps)
        return FieldQuantiser.fit(data, normalisation, self.blocks(data), bins=self.bins, edges=self.edges)

    def dataset(self, data: GriddedData, split: str, quantiser: FieldQuantiser) -> TokenWindows:
        from data.datasets.token_windows import TokenWindows

        return TokenWindows(
            data,
            split,
            quantiser,
            self.blocks(data),
            input_frames=self.input_frames,
            lead_steps=self.lead_steps,
            stride=1 if split == "train" else self.stride,
        )

    # Training

    def augment(self, batch: Batch, model: EncodeProcessDecode) -> Batch:
        return batch

    def total_weights(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Number of tokens to predict in all batches, per target and latent: (L,)."""
        totals: dict[str, Tensor] = {}
        for batch in batches:
            for name, target in batch.targets.items():
                valid = target.tokens >= 0 if target.valid is None else target.valid
                totals[name] = totals.get(name, 0.0) + valid.float().sum(0)
        return totals

    def sums(self, outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of errors and numbers of tokens, per target: (L,) each."""
        from models.heads import build_head

        head = build_head("token", loss=self.loss_name)
        return {name: head.loss(output, batch.targets[name]) for name, output in outputs.items()}

    def combine(self, sums: Mapping[str, Tensor], totals: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
        """`loss`, in nats a token, and that of each target."""
        losses = {name: sums[name].sum() / totals[name].sum().clamp(min=1) for name in layout.targets}
        return {"loss": sum(losses.values()), **losses}

    # Evaluation

    def evaluate(
        self, run: RunFolder, model: EncodeProcessDecode, data: GriddedData, quantiser: FieldQuantiser, choices: Choices
    ) -> Findings:
        """Scores sampled ensembles and writes their files; weights, baselines and regions are no choice here.

        Raises ValueError where they are chosen all the same.
        """
        from evaluation.ensemble_report import evaluate_ensembles

        return evaluate_ensembles(run, model, self, data, quantiser, choices)
