"""The training loop on a tiny forecast: what a step does, when it validates, saves and stops."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_run import LinearModel, tiny_data, tiny_loop, tiny_task
from torch import nn

from training.averaging import WeightAverage
from training.metrics_log import MetricsLog, read_metrics
from training.optimizers import build_optimizer, learning_rate, parameter_groups
from training.tracking import NoTracker


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"), variables=("t2m", "msl"), missing=0.1)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.convolution = nn.Conv2d(2, 2, 3)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(5, 4)
        self.latents = nn.Parameter(torch.zeros(6, 4))
        self.tied = self.linear
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_only_weight_matrices_decay():
    model = Parts()
    decayed, spared = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    assert {id(item) for item in decayed["params"]} == {id(model.linear.weight), id(model.convolution.weight)}
    assert {id(item) for item in spared["params"]} == {
        id(item)
        for item in (
            model.linear.bias,
            model.convolution.bias,
            model.norm.weight,
            model.norm.bias,
            model.embedding.weight,
            model.latents,
        )
    }


def test_decay_leaves_spared_parameters_alone():
    model = Parts()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = build_optimizer(model, name="adamw", lr=0.1, weight_decay=0.5, betas=(0.9, 0.95), eps=1e-8)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.linear.weight, torch.full((4, 3), 0.95))
    assert (model.latents == 1).all() and (model.norm.weight == 1).all() and (model.linear.bias == 1).all()


def test_schedule_warms_up_then_falls_to_the_final_rate():
    schedule = dict(max_steps=100, lr=1.0, name="cosine", warmup_steps=10, final_lr_fraction=0.1)
    rates = [learning_rate(step, **schedule) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert max(rates) == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    middle = 10 + 89 / 2
    assert learning_rate(middle, **schedule) == pytest.approx(0.55)
    assert {learning_rate(step, **{**schedule, "name": "constant"}) for step in range(10, 100)} == {1.0}


def test_average_follows_its_formula():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.5)
    expected = model.weight.detach().double().clone()
    for update in range(12):
        with torch.no_grad():
            model.weight.add_(torch.randn(2))
            model.running_mean.add_(1.0)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
        average.update(model)
    torch.testing.assert_close(average.model.weight.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(average.model.running_mean, model.running_mean)
    assert not average.model.training


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_accumulated_batches_equal_one_large_batch(data, tmp_path, loss):
    """With missing values the batches weigh differently: only global sums of weights give the same gradient."""
    weights = []
    for batch_size, accumulate in ((8, 1), (4, 2), (2, 4)):
        task = tiny_task(loss=loss, lead_weights=[1.0, 3.0], variable_weights={"msl": 0.5})
        loop = tiny_loop(
            tmp_path / str(accumulate),
            data,
            task=task,
            model=_linear(task, data),
            batch_size=batch_size,
            accumulate=accumulate,
            optimizer="sgd",  # Adam divides by gradients, which turns rounding of those near 0 into full steps
            max_steps=3,
            ema_decay=None,
        )
        outcome = loop.run(NoTracker())
        assert outcome.progress.step == 3
        weights.append(torch.cat([parameter.detach().flatten() for parameter in loop.model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights[2], weights[0], atol=1e-6, rtol=1e-5)


def test_loss_equals_its_definition_in_float64(data):
    task = tiny_task(lead_weights=[1.0, 3.0], variable_weights={"msl": 0.5})
    dataset = task.dataset(data, "train", task.fit(data))
    batch = dataset.__getitems__([0, 5, 9])
    target = batch.targets["forecast"]
    output = torch.randn(target.values.shape, requires_grad=True)
    sums, _ = task.sums({"forecast": output}, batch)["forecast"]
    losses = task.combine({"forecast": sums}, task.total_weights([batch]), batch.layout)

    truth = (target.values.double() - target.reference.values) / target.reference.scale
    area = target.grid.area_weights.expand(truth.shape) * target.presence
    error = torch.where(target.presence, (output.double() - truth) ** 2, 0.0)
    means = (area * error).sum((0, 3, 4)) / area.sum((0, 3, 4))
    importance = torch.tensor([[1.0, 0.5], [3.0, 1.5]]).double()
    expected = (importance * means).sum() / importance.sum()
    torch.testing.assert_close(losses["loss"].double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(losses["msl"].double(), means[:, 1].mean(), atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(losses["loss"], output)
    assert gradient.isfinite().all() and (gradient[~target.presence] == 0).all()


def test_a_batch_without_a_variable_still_has_a_loss(data):
    task = tiny_task()
    batch = task.dataset(data, "train", task.fit(data)).__getitems__([0, 1])
    target = batch.targets["forecast"]
    target.values[:, :, 1] = torch.nan
    target.valid[:, :, 1] = False
    output = torch.randn(target.values.shape, requires_grad=True)
    sums, _ = task.sums({"forecast": output}, batch)["forecast"]
    losses = task.combine({"forecast": sums}, task.total_weights([batch]), batch.layout)
    torch.testing.assert_close(losses["loss"], losses["t2m"])
    losses["loss"].backward()
    assert output.grad.isfinite().all() and (output.grad[:, :, 1] == 0).all()


def test_validation_uses_the_average_and_every_window(data, tmp_path):
    loop = tiny_loop(tmp_path, data, max_steps=2, validate_every=2)
    loop.run(NoTracker())
    recorded = read_metrics(tmp_path / "metrics.jsonl")[-1]["val/loss"]
    dataset = loop.validation_loader.dataset
    batch = dataset.__getitems__(range(len(dataset)))
    with torch.no_grad():
        outputs = loop.average.model(batch)
    sums, totals = loop.task.sums(outputs, batch)["forecast"]
    expected = loop.task.combine({"forecast": sums}, {"forecast": totals}, batch.layout)["loss"]
    assert recorded == pytest.approx(float(expected), rel=1e-5)
    assert loop.model.training


def test_metrics_hold_one_line_a_step(data, tmp_path):
    tiny_loop(tmp_path, data, max_steps=6, validate_every=3).run(NoTracker())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"train/loss", "train/lr", "train/gradient_norm"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines if "val/loss" in line] == [3, 6]


def test_metrics_log_drops_later_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 0.1}\n{"step": 2, "train/loss": 0.2}\n{"step": 3, "tra')
    log = MetricsLog(path, last_step=1)
    log.write(2, {"train/loss": 0.25})
    assert read_metrics(path) == [{"step": 1, "train/loss": 0.1}, {"step": 2, "train/loss": 0.25}]
    log.close()


def test_early_stopping_counts_validations_without_improvement(data, tmp_path):
    loop = tiny_loop(tmp_path, data, max_steps=50, validate_every=2, early_stopping=3)
    scores = iter([5.0, 4.0, 4.5, 4.0, 4.2, 1.0])
    loop.validate = lambda: {"val/loss": next(scores)}
    outcome = loop.run(NoTracker())
    assert outcome.stopped_early and outcome.progress.step == 10
    assert (outcome.progress.best_step, outcome.progress.best_score) == (4, 4.0)
    assert (tmp_path / "checkpoints" / "best").readlink().name == "step_00000004"
    assert (tmp_path / "checkpoints" / "last").readlink().name == "step_00000010"
    again = tiny_loop(tmp_path, data, max_steps=50, validate_every=2, early_stopping=3)
    again.resume((tmp_path / "checkpoints" / "last").resolve())
    assert again.run(NoTracker()).progress.step == 10


def test_a_loss_that_is_not_finite_names_step_variable_and_checkpoint(data, tmp_path):
    loop = tiny_loop(tmp_path, data, max_steps=6, validate_every=2, clip_norm=None)
    augment, calls = loop.task.augment, []

    def spoil(batch, model):
        calls.append(batch)
        if len(calls) == 5:
            batch.targets["forecast"].values[:, :, 1] = math.inf
        return augment(batch, model)

    loop.task.augment = spoil
    with pytest.raises(ValueError, match=r"training loss is not finite at step 5 \(variables: msl\).*step_00000004"):
        loop.run(NoTracker())
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_overfitting_one_batch_drives_the_loss_down(data, tmp_path):
    loop = tiny_loop(
        tmp_path, data, model=_linear(tiny_task(), data), overfit_batches=1, max_steps=120, validate_every=120, lr=3e-2
    )
    loop.run(NoTracker())
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.02 * losses[0]


def test_input_noise_only_touches_training_inputs(data):
    noisy = tiny_task(input_noise=0.5)
    batch = noisy.dataset(data, "train", noisy.fit(data)).__getitems__([0, 1])
    seen = noisy.augment(batch, None)
    difference = (seen.inputs["prognostic"].filled - batch.inputs["prognostic"].filled).double()
    present = batch.inputs["prognostic"].presence
    assert difference[present].std().item() == pytest.approx(0.5, rel=0.1)
    assert seen.targets is batch.targets
    assert tiny_task().augment(batch, None) is batch


def test_the_loss_at_some_places_is_that_of_all_weighted_by_their_areas(data):
    from models import build

    task = tiny_task(query_fraction=0.5)
    overrides = ["model/size=tiny", "model.hidden_size=8", "model.depth=1", "model.num_heads=2", "model.patch_size=2"]
    layout = task.layout(data)
    model = build([*overrides, "model.decoder.zero_head=false"], layout).eval()
    batch = task.dataset(data, "train", task.fit(data)).__getitems__([0, 3, 5])
    some = task.augment(batch, model)
    places = some.places["forecast"]
    assert 0 < len(places) < batch.targets["forecast"].grid.num_points

    target = batch.targets["forecast"]
    error = (model(batch)["forecast"] - (target.values - target.reference.values) / target.reference.scale) ** 2
    weights = (target.grid.area_weights.float() * target.presence).expand_as(error).flatten(3)[..., places]
    error = torch.where(target.presence.expand_as(error), error, 0.0).flatten(3)[..., places]
    expected = ((weights * error).sum((0, 3)) / weights.sum((0, 3))).mean()
    sums = {name: weighted for name, (weighted, _) in task.sums(model(some), some).items()}
    torch.testing.assert_close(task.combine(sums, task.total_weights([some]), layout)["loss"], expected)


def test_bf16_trains_with_float32_weights(data, tmp_path):
    loop = tiny_loop(tmp_path, data, precision="bf16", max_steps=4)
    loop.run(NoTracker())
    assert {parameter.dtype for parameter in loop.model.parameters()} == {torch.float32}
    exact = tiny_loop(tmp_path / "exact", data, max_steps=4)
    exact.run(NoTracker())
    low, full = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, tmp_path / "exact"))
    assert low[0]["train/loss"] != full[0]["train/loss"]
    assert low[-1]["train/loss"] == pytest.approx(full[-1]["train/loss"], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(precision="fp8"), "trainer.precision=fp8"),
        (dict(device="tpu0"), "trainer.device=tpu0"),
        (dict(keep=0), "trainer.keep=0"),
        (dict(ema_decay=1.0), "trainer.ema_decay=1.0"),
    ],
)
def test_settings_out_of_range_are_refused(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_loop(tmp_path, data, **changes)


def _linear(task, data) -> LinearModel:
    torch.manual_seed(1)
    return LinearModel(task.layout(data))
