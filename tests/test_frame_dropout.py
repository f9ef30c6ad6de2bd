import torch

from data.observations import Observations
from models.frame_dropout import draw_key, frame_dropout, row_numbers


def test_frames_are_dropped_alike_wherever_they_are_held():
    x, key = torch.randn(3, 8, 5, 64), draw_key(torch.device("cpu"))
    whole = frame_dropout(x, share=0.3, key=key, layer=2, first_frame=0)
    parts = [frame_dropout(x[:, i : i + 2], share=0.3, key=key, layer=2, first_frame=i) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=0)


def test_the_share_is_kept_the_rest_is_scaled_and_masks_are_independent():
    x, key = torch.ones(8, 8, 64, 64), torch.tensor(1234567)
    dropped = frame_dropout(x, share=0.3, key=key, layer=0, first_frame=0)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.7]))
    lost = (dropped == 0).double()
    assert abs(lost.mean() - 0.3) < 0.002
    others = (
        frame_dropout(x, share=0.3, key=key, layer=1, first_frame=0),
        frame_dropout(x, share=0.3, key=key + 1, layer=0, first_frame=0),
        dropped.roll(1, 0),
        dropped.roll(1, 1),
        dropped.roll(1, 2),
        dropped.roll(1, 3),
    )
    for other in others:  # about 2 million numbers: correlations are below 0.003 by chance
        assert abs(torch.corrcoef(torch.stack([lost.flatten(), (other == 0).double().flatten()]))[0, 1]) < 0.005


def test_gradients_pass_where_numbers_stay():
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    key = torch.tensor(5)
    assert torch.autograd.gradcheck(lambda y: frame_dropout(y, share=0.5, key=key, layer=0, first_frame=1), (x,))


def test_rows_draw_the_same_numbers_whichever_frames_are_held():
    rows, generator = 4000, torch.Generator().manual_seed(0)
    ids = torch.zeros(rows, dtype=torch.int64)
    observations = Observations(
        value=torch.zeros(rows),
        batch=torch.randint(0, 2, (rows,), generator=generator),
        frame=torch.randint(0, 4, (rows,), generator=generator),
        channel=ids,
        platform=ids,
        type=ids,
        times=torch.zeros(2, 4, dtype=torch.int64),
    )
    key = torch.tensor(99)
    whole = row_numbers(observations, key, 0)
    for first in (0, 2):
        mine = (observations.frame >= first) & (observations.frame < first + 2)
        torch.testing.assert_close(row_numbers(observations.of_frames(first, 2), key, first), whole[mine])
    assert len(whole.unique()) > rows - 10 and abs(whole.mean() - 0.5) < 0.02
