"""Attention within a disk on the sphere, against the dense formula with great-circle distances in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from data.grids import LatLonGrid
from data.healpix import HEALPixGrid, padxy_to_nest
from models.attention import disk as disk_module
from models.attention.disk import Disk
from models.attention.self_attention import SpatialAttention
from models.latents import LatentLayout, Latents
from models.processors.video_dit import VideoDiT

HEALPIX = HEALPixGrid(2, "padxy").coordinates  # 192 cells, 14.7 degrees apart
LATLON = LatLonGrid(latitude=np.linspace(90, -90, 13), longitude=np.arange(24) * 15.0).coordinates
PLACES = {"healpix": (HEALPIX, 31.7), "latlon": (LATLON, 22.3)}


def haversine(coordinates):
    """(N, 2) -> (N, N) degrees, by another formula than the one under test."""
    latitude, longitude = coordinates.double().deg2rad().unbind(-1)
    rise = ((latitude[:, None] - latitude) / 2).sin().square()
    turn = ((longitude[:, None] - longitude) / 2).sin().square()
    chord = rise + latitude.cos()[:, None] * latitude.cos() * turn
    return 2 * chord.clamp(0, 1).sqrt().asin().rad2deg()


def reference(query, key, value, reads, scale):
    """reads: (B, N, N); rows that read nothing give zeros."""
    logits = torch.einsum("bhnd,bhmd->bhnm", query, key) * scale
    weights = logits.exp() * reads[:, None]
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhnm,bhme->bhne", weights, value) / torch.where(total == 0, 1, total)


def heads(places, *, batch=2, width=6):
    torch.manual_seed(0)
    shape = (3, batch, 2, places.shape[0], width)
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def keys_kept(places, batch=2):
    """(B, N): two thirds of the tokens; of the last row only the far side of the globe."""
    torch.manual_seed(1)
    kept = torch.rand(batch, places.shape[0]) < 0.67
    kept[-1] &= places[:, 0] < -30
    return kept


# Uncompiled, flex attention warns that it holds the whole matrix.
@pytest.fixture
def eager_flex(monkeypatch):
    """Flex attention without a compiler, on any device: it evaluates the mask of every pair."""
    monkeypatch.setattr(disk_module, "compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(disk_module, "require_backend", lambda backend, device: None)


@pytest.mark.parametrize("masked", (False, True), ids=("all", "masked"))
@pytest.mark.parametrize("backend", ("auto", "blockwise", "reference", "sdpa"))
@pytest.mark.parametrize("places, radius", PLACES.values(), ids=PLACES)
def test_values_and_gradients_equal_the_dense_formula(places, radius, backend, masked):
    inputs, kept = heads(places), keys_kept(places) if masked else None
    reads = (haversine(places) <= radius).expand(2, -1, -1)
    reads = reads if kept is None else reads & kept[:, None]
    assert masked == (~reads.any(-1)).any()  # some rows read nothing
    wanted = reference(*inputs, reads, 0.4)
    found = Disk(places, radius).attend(*inputs, scale=0.4, key_mask=kept, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert not found[(~reads.any(-1))[:, None].expand(found.shape[:3])].any()
    towards = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, inputs, towards)[0]
    torch.testing.assert_close(torch.autograd.grad(found, inputs, towards)[0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("masked", (False, True), ids=("all", "masked"))
@pytest.mark.parametrize("places, radius", PLACES.values(), ids=PLACES)
def test_flex_equals_the_dense_formula(places, radius, masked, eager_flex):
    inputs, kept = heads(places).detach(), keys_kept(places) if masked else None
    reads = (haversine(places) <= radius).expand(2, -1, -1)
    reads = reads if kept is None else reads & kept[:, None]
    found = Disk(places, radius).attend(*inputs, scale=0.4, key_mask=kept, backend="flex")
    torch.testing.assert_close(found, reference(*inputs, reads, 0.4), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("radius", (0.5, 9.0, 40.0, 120.0, 180.0))
def test_blocks_hold_every_pair_and_whole_blocks_no_other(radius):
    disk = Disk(HEALPixGrid(3, "padxy").coordinates, radius)
    reads = disk.dense()[disk.order][:, disk.order]
    pairs = reads.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # (6, 128, 6, 128)
    mask = disk.block_mask()
    assert torch.equal(mask.to_dense()[0, 0].bool(), pairs.any(dim=3).any(dim=1))
    whole = torch.zeros(6, 6, dtype=torch.bool)
    for row in range(6):
        whole[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()] = True
    assert torch.equal(whole, pairs.all(dim=3).all(dim=1))
    assert whole.all() == (radius == 180)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masked", (False, True), ids=("all", "masked"))
@pytest.mark.parametrize("places, radius", PLACES.values(), ids=PLACES)
def test_compiled_flex_and_its_gradients_equal_the_dense_formula_on_cuda(places, radius, masked):
    inputs, kept = heads(places, width=32), keys_kept(places) if masked else None
    reads = (haversine(places) <= radius).expand(2, -1, -1)
    reads = reads if kept is None else reads & kept[:, None]
    wanted = reference(*inputs, reads, 0.2)
    given = inputs.detach().float().cuda().requires_grad_()
    found = Disk(places, radius).cuda().attend(*given, scale=0.2, key_mask=None if kept is None else kept.cuda())
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-2, atol=1e-2)
    towards = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, inputs, towards)[0]
    gradient = torch.autograd.grad(found, given, towards.float().cuda())[0]
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=2e-2, atol=2e-2)


# The disk


def test_places_exactly_at_the_radius_are_inside():
    reads = Disk(LATLON, 30.0).dense()
    assert torch.equal(reads, haversine(LATLON) <= 30 + 1e-6)
    assert not torch.equal(reads, haversine(LATLON) <= 30 - 1e-6)


def test_the_disk_crosses_the_meridians_and_the_poles():
    rows = [
        (0, 359),
        (0, 1),
        (0, -2),
        (0, 179),
        (0, -179),
        (89, 0),
        (89, 180),
        (89, 90),
        (-89.5, 10),
        (-90, 200),
        (3, 0),
    ]
    reads = Disk(torch.tensor(rows), 3.1).dense()
    groups = [{0, 1, 2}, {3, 4}, {5, 6, 7}, {8, 9}, {10}]
    expected = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for group in groups:
        for a in group:
            expected[a, list(group)] = True
    for near in (1,):  # (3, 0) is 3.16 degrees from (0, 1) and further from the others
        assert haversine(torch.tensor(rows))[10, near] > 3.1
    assert torch.equal(reads, expected)


def test_a_radius_below_the_spacing_leaves_each_token_itself():
    inputs = heads(HEALPIX)
    found = Disk(HEALPIX, 1e-3).attend(*inputs, scale=1.0)
    torch.testing.assert_close(found, inputs[2])


def test_the_order_of_tokens_changes_nothing_but_their_places():
    inputs, shuffled = heads(LATLON), torch.randperm(LATLON.shape[0])
    found = Disk(LATLON, 25.0).attend(*inputs, scale=0.4)
    moved = Disk(LATLON[shuffled], 25.0).attend(*inputs[:, :, :, shuffled], scale=0.4)
    torch.testing.assert_close(moved, found[:, :, shuffled], rtol=1e-12, atol=1e-12)


def test_healpix_tokens_are_sorted_in_nest_order_and_groups_read_few():
    grid = HEALPixGrid(5, "padxy")
    disk = Disk(grid.coordinates, 10.46)
    cells = torch.arange(grid.num_points)
    assert torch.equal(padxy_to_nest(disk.order, 5), cells)
    share = 64 * sum(disk.sizes) / grid.num_points**2
    assert share < 0.04  # the disk itself is 0.8 % of the sphere


@pytest.mark.parametrize("radius", (0, -3.5, math.nan, math.inf))
def test_a_wrong_radius_is_refused(radius):
    with pytest.raises(ValueError, match=rf"model\.processor\.radius={radius} must be a distance above 0 in degrees"):
        Disk(HEALPIX, radius)


def test_free_latents_are_refused():
    with pytest.raises(ValueError, match=r"model\.processor\.radius=5\.0 needs tokens with places"):
        Disk(None, 5.0)


# In the processor


def processor(radius, **options):
    torch.manual_seed(0)
    described = LatentLayout(num_tokens=192, hidden_size=16, frames=2, coordinates=HEALPIX)
    given = {"depth": 2, "num_heads": 2, "radius": radius, "temporal": False, **options}
    model = VideoDiT(None, described, **given)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def latents(valid=None):
    torch.manual_seed(1)
    tokens = torch.randn(2, 2, 192, 16, dtype=torch.float64, requires_grad=True)
    return Latents(tokens=tokens, times=torch.zeros(2, 2, dtype=torch.int64), valid=valid, frames=(0, 2))


def test_a_radius_beyond_the_antipodes_is_global_attention():
    given, everywhere = latents(), processor(None)
    for radius in (180.0, 400.0):
        near = processor(radius)
        near.load_state_dict(everywhere.state_dict())  # no table is among the weights
        torch.testing.assert_close(near(given).tokens, everywhere(given).tokens, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("qk_norm", ("rms", "layer", "none"))
@pytest.mark.parametrize("backend", ("blockwise", "sdpa"))
def test_a_layer_equals_the_reference_backend(qk_norm, backend):
    torch.manual_seed(0)
    disk = Disk(HEALPIX, 31.7)
    layers = [
        SpatialAttention(16, num_heads=2, qk_norm=qk_norm, disk=disk, backend=name).double()
        for name in (backend, "reference")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    given = latents().tokens
    found, wanted = (layer(given) for layer in layers)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    towards = torch.randn_like(wanted)
    gradients = [
        torch.autograd.grad(output, [given, *layer.parameters()], towards)
        for layer, output in zip(layers, (found, wanted), strict=True)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_what_is_masked_is_never_read():
    valid = torch.rand(2, 2, 192) < 0.7
    valid[0, 1] = False  # a frame of which nothing is known
    valid[1, 0] &= HEALPIX[:, 0] < 0  # and one with disks of which nothing is
    model, given = processor(20.0), latents(valid)
    expected = model(given).tokens
    hidden = given.tokens.detach().masked_fill(~valid[..., None], torch.nan).requires_grad_()
    output = model(given.with_tokens(hidden)).tokens
    assert torch.equal(output, expected) and output.isfinite().all()
    output.sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[~valid].any()


def test_what_is_beyond_the_disk_is_never_read():
    model, given = processor(25.0, depth=1), latents()
    reads = torch.autograd.grad(model(given).tokens[0, 0, 7].sum(), given.tokens)[0][0, 0].any(dim=-1)
    assert torch.equal(reads, haversine(HEALPIX)[7] <= 25)


def test_recomputed_activations_change_no_gradient():
    gradients = []
    for option in ("none", "all"):
        model, given = processor(25.0, checkpoint=option).train(), latents()
        gradients.append(torch.autograd.grad(model(given).tokens.square().sum(), [given.tokens, *model.parameters()]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_autocast_differs_by_rounding_only():
    model, given = processor(25.0), latents()
    expected = model(given).tokens
    tokens = given.tokens.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = model.float()(given.with_tokens(tokens)).tokens
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    found.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert tokens.grad.isfinite().all()


def test_tables_are_shared_by_layers_and_keep_their_precision():
    model = processor(25.0, depth=3).bfloat16()
    disks = [module for module in model.modules() if isinstance(module, Disk)]
    assert len(disks) == 1 and disks[0].vectors.dtype == torch.float64
    assert not any("disk" in name for name in model.state_dict())


def test_models_made_on_the_meta_device_hold_tables_and_run_there():
    with torch.device("meta"):
        model = processor(25.0)
    assert torch.equal(model.blocks[0].spatial.disk.dense(), haversine(HEALPIX) <= 25)
    model = model.to("meta")
    valid = torch.ones(2, 2, 192, dtype=torch.bool, device="meta")
    given = Latents(
        tokens=latents().tokens.detach().to("meta").requires_grad_(), times=valid[..., 0].long(), valid=valid
    )
    output = model(given).tokens
    output.sum().backward()
    assert output.is_meta and output.shape == given.tokens.shape
