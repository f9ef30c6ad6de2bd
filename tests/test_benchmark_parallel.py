"""The benchmark of context parallelism and the cost model: bytes as counted, parameters, published times."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import costs, parallel, scaling_model
from benchmarks.collectives import SentBytes, most
from benchmarks.costs import H100, H200, Architecture, Plan
from data.healpix import HEALPixGrid
from models import build
from models.composition import compose
from models.memory import OVERHEAD, training_bytes
from tests.model_examples import observed_layout, tiny_batch
from tests.rank_work import FRAMES, TINY
from training.run import build_task

PRODUCTION = Architecture()


@pytest.fixture(scope="module")
def counted() -> list[dict]:
    """Rows of the byte count on two ranks."""
    torch.manual_seed(0)
    config = compose([*TINY, "model.drop_path=0.0"])
    config.optimizer.lr = 1e-3
    layout = observed_layout(HEALPixGrid(2, "nest"), frames=FRAMES)  # 48 places: pieces need no padding
    batch = tiny_batch(layout, batch_size=2, rows=100)
    return parallel.bytes_rows((config, build_task(config), batch), (2,))


def test_ranks_send_the_minimum(counted):
    rows = {row["case"]: row for row in counted}
    for case in ("float32", "bf16", "float32, 4 pieces"):
        assert rows[case]["sent"] == rows[case]["minimum"] > 0, case
    assert rows["float32"]["sent"] == 2 * rows["bf16"]["sent"]
    assert rows["float32, dtensor"]["sent"] == 2 * rows["float32"]["sent"]  # an all-gather, where gloo runs it


def test_gradients_travel_once(counted):
    for row in counted:
        sums = row["reduced"] - row["gradients"]
        assert 0 < sums < 200, row  # of losses and weights


def test_a_collective_that_is_not_known_is_not_overlooked():
    torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1, backend="gloo")
    try:
        assert most(0.5) == 0.5
        with SentBytes() as counter:
            torch.distributed.all_reduce(torch.zeros(3))
        assert counter.sent == {"allreduce_": 0}  # alone, nothing travels
        with pytest.raises(NotImplementedError, match="gather_"), SentBytes():
            torch.distributed.gather(torch.zeros(1), [torch.zeros(1)])
    finally:
        torch.distributed.destroy_process_group()


def test_parameters_of_the_published_model():
    assert PRODUCTION.parameters == 1_506_070_474


def test_parameters_of_a_model_that_is_built():
    layout = observed_layout(frames=FRAMES)
    with torch.device("meta"):
        model = build(TINY, layout)
    latents, block = model.encoder.latent_layout, model.processor.blocks[0]
    mine = Architecture(
        hidden_size=latents.hidden_size,
        depth=len(model.processor.blocks),
        places=latents.num_tokens,
        frames=FRAMES,
        condition_size=model.condition.out.out_features,
        noise_channels=model.condition.up.in_features,
        observation_width=block.observations.query.out_features,
        observation_kv_width=block.observations.key.out_features,
        outputs=2,
        table_rows=1,
        table_width=PRODUCTION.table_width,
    )
    tables = [parameter for name, parameter in model.named_parameters() if "table" in name]
    rows = sum(table.numel() for table in tables) - sum(table.shape[1] for table in tables)
    assert sum(parameter.numel() for parameter in block.parameters()) == mine.block_parameters
    assert sum(parameter.numel() for parameter in model.parameters()) == mine.parameters + rows


@pytest.mark.parametrize("name", list(costs.PUBLISHED))
def test_published_times_within_a_factor_of_two(name):
    estimated, published = costs.comparison(PRODUCTION)[name]
    assert 0.5 < estimated / published < 2


def test_reshard_bytes_of_the_published_run():
    # One frame of 12288 places a rank, 7/8 of it sent, in bf16, there and back.
    sent = costs.reshard_bytes(ranks=8, blocks=1, tokens=12288, hidden_size=1536, itemsize=2, backward=False)
    assert sent == 2 * 12288 * 1536 * 2 * 7 // 8
    assert costs.reshard_bytes(ranks=1, blocks=1, tokens=12288, hidden_size=1536, itemsize=2, backward=True) == 0


def test_work_is_shared_and_checkpointing_costs_one_forward():
    alone, eight = (costs.block(PRODUCTION, H100, Plan(gpus=8, cp=cp)) for cp in (1, 8))
    assert alone.forward == pytest.approx(8 * eight.forward)
    assert alone.reshard == 0 < eight.reshard
    again = costs.block(PRODUCTION, H100, Plan(gpus=8, cp=8, checkpoint=True))
    assert again.backward == pytest.approx(eight.forward + eight.backward)
    assert again.reshard > eight.reshard


def test_memory_of_a_rank():
    plain, sharded = (costs.memory(PRODUCTION, Plan(gpus=16, fsdp=fsdp)) for fsdp in (False, True))
    assert plain.state == 20 * PRODUCTION.parameters  # float32: weights, gradients, two moments, average
    assert sharded.state == pytest.approx(plain.state / 16)
    assert sharded.activations == plain.activations
    kept, recomputed = (costs.memory(PRODUCTION, Plan(gpus=8, checkpoint=c)).activations for c in (False, True))
    assert recomputed[1] < kept[0]


def test_activations_are_those_that_a_size_is_chosen_by():
    layout = observed_layout(HEALPixGrid(6, "nest"), frames=8)
    needed = [
        training_bytes(
            compose(["model=healda_v2", "model/size=production", f"model.depth={depth}", "task.frames=8"]),
            layout,
            batch_size=1,
            sixteen_bit=True,
        )
        for depth in (1, 2)
    ]
    block = (needed[1] - needed[0]) / OVERHEAD - 20 * PRODUCTION.block_parameters
    assert block / (PRODUCTION.tokens * PRODUCTION.hidden_size) == pytest.approx(costs.KEPT[1], rel=0.02)


def test_a_network_between_nodes_costs_time_and_the_backward_pass_hides_it():
    one, many = (costs.step(PRODUCTION, H200, Plan(gpus=gpus)) for gpus in (8, 512))
    assert many.parameters > one.parameters
    assert many.exposed < many.parameters < many.backward
    slow = replace(H200, network=1e9)
    exposed = costs.step(PRODUCTION, slow, Plan(gpus=512))
    assert exposed.exposed == pytest.approx(exposed.parameters - exposed.backward)


def test_the_page_holds_what_the_model_prints(capsys):
    scaling_model.main(["--no-store"])
    assert capsys.readouterr().out.strip() in scaling_model.PAGE.read_text()


def test_tables_have_a_line_a_row():
    rows = [
        {"part": "start", "case": "joined", "cp": 8, "seconds": 4.0, "from_python": 6.0, "slowest": 5.0},
        {"part": "steps", "case": "tiny", "cp": 2, "wall": 1.0, "wall_ratio": 1.5, "cpu": 2.0, "cpu_ratio": 1.1},
    ]
    text = parallel.table([row | {"load_average": [3.5, 2.0, 1.0]} for row in rows])
    assert "| tiny | 2 | 1.00 | 1.50 | 2.00 | 1.10 | 3.5 |" in text
    assert text.index("training step") < text.index("Start of the ranks")


def test_ranks_that_change_the_loss_are_not_timed(monkeypatch):
    losses = iter([1.0, 1.1])

    def measured(function, *arguments, cp):
        return {"loss": next(losses), "wall": [1.0], "cpu": [1.0]}

    monkeypatch.setattr(parallel, "on_ranks", measured)
    with pytest.raises(RuntimeError, match="cp=2 has the loss"):
        parallel.steps_rows((SimpleNamespace(),), "tiny", (1, 2), rounds=1, steps=1)
