"""Lead times: FiLM, the decoder that reads the whole bottleneck, lead times of each sample."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import pytest
import torch

from data.batch import Batch
from data.grids import LatLonGrid
from models import build
from models.attention import AttentionLayer
from models.composition import build_from_config, compose
from models.conditioning.lead_time import LeadTimeFeatures, LeadTimeFiLM
from models.encode_process_decode import describe
from models.latents import Latents
from tests.model_examples import COARSE, GLOBAL, HOUR, LEADS, REGION, STATIONS, observed_layout, tiny_batch, tiny_layout

TINY = ["model/encoder=perceiver", "model/processor=latent_transformer", "model/decoder=lead_time", "model/size=tiny"]
TINY += ["model.hidden_size=16", "model.depth=1", "model.num_heads=2", "model.num_latents=6", "model.patch_size=3"]
TINY += ["model.dropout=0", "model.drop_path=0"]


def built(*given: str, layout=None, random: bool = True):
    torch.manual_seed(0)
    model = build([*TINY, *given], layout or tiny_layout()).eval()
    for name, parameter in model.named_parameters():
        if random and (not parameter.any() or "norm" in name):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


# Features and FiLM


def test_one_hot_features_are_exact_at_trained_lead_times_proportional_between_and_constant_beyond():
    features = LeadTimeFeatures(LEADS, kind="onehot")
    assert torch.equal(features(torch.tensor(LEADS)), torch.eye(3))
    between = features(torch.tensor([[15.0 * HOUR, 36.0 * HOUR], [1.0 * HOUR, 100.0 * HOUR]]))
    wanted = [[[0.5, 0.5, 0], [0, 0.75, 0.25]], [[1, 0, 0], [0, 0, 1]]]
    torch.testing.assert_close(between, torch.tensor(wanted))
    assert torch.equal(LeadTimeFeatures((HOUR,), kind="onehot")(torch.tensor([5.0])), torch.ones(1, 1))


def test_fourier_features_span_the_trained_range_and_tell_all_lead_times_apart():
    features = LeadTimeFeatures(LEADS, kind="fourier", num_bands=2)
    first, last = features(torch.tensor([LEADS[0], LEADS[-1]]))
    torch.testing.assert_close(first, torch.tensor([-1.0, -1, 0, 0, -1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(last, torch.tensor([1.0, 1, 0, 0, -1]), atol=1e-5, rtol=0)
    many = features(torch.linspace(0, 100 * HOUR, 200))
    assert (many[1:, 0] > many[:-1, 0]).all() and many.isfinite().all()
    features.bfloat16()
    assert features.known.dtype == torch.float32
    assert LeadTimeFeatures(LEADS, kind="both").size == 3 + 9


@pytest.mark.parametrize("generator", ("shared", "per_block"))
def test_film_starts_as_the_identity_and_generates_one_modulation_a_layer(generator):
    layers = [AttentionLayer(width, num_heads=2) for width in (4, 6, 4)]
    film = LeadTimeFiLM(layers, lead_times=LEADS, generator=generator, hidden=3)
    given = torch.tensor([6.0, 30.0]) * HOUR
    for modulation, width in zip(map(film(given).of, layers), (4, 6, 4), strict=True):
        for part in vars(modulation).values():
            assert part.shape == (2, 1, width) and not part.any()
    for head in film.heads:
        torch.nn.init.normal_(head.weight)
    first, _, third = map(film(torch.stack([given, given.flip(0)])).of, layers)
    assert first.mlp_shift.shape == (2, 2, 4)
    torch.testing.assert_close(first.mlp_shift[0], first.mlp_shift[1].flip(0))
    assert torch.equal(first.mlp_scale, third.mlp_scale) == (generator == "shared")
    assert torch.equal(first.attention_scale, first.mlp_scale) == (generator == "shared")


def test_film_is_applied_after_the_norm_of_both_branches():
    torch.manual_seed(0)
    layer = AttentionLayer(4, 6, num_heads=2).double()
    film = LeadTimeFiLM([layer], lead_times=LEADS).double()
    for parameter in [*film.parameters(), *layer.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5)
    x, context = torch.randn(2, 3, 4).double(), torch.randn(2, 5, 6).double()
    lead = torch.tensor([7.0 * HOUR, 50.0 * HOUR])
    gamma, beta = film.heads[0](torch.nn.functional.gelu(film.trunk(film.features(lead).double()))).chunk(2, dim=-1)
    gamma, beta = gamma[:, None], beta[:, None]
    prepared = layer.prepare(context, num_queries=3)
    y = x + layer.attention((1 + gamma) * layer.query_norm(x) + beta, prepared)
    wanted = y + layer.mlp((1 + gamma) * layer.mlp_norm(y) + beta)
    for modulation in (film(lead), film(lead).of(layer)):
        torch.testing.assert_close(layer(x, context, modulation=modulation), wanted)


@pytest.mark.parametrize("wrong", ({"features": "sine"}, {"generator": "own"}, {"hidden": 0}))
def test_film_refuses_what_it_does_not_know(wrong):
    with pytest.raises(ValueError, match=r"model.decoder.(lead_features|film|film_hidden)="):
        LeadTimeFiLM([AttentionLayer(4, num_heads=2)], lead_times=LEADS, **wrong)


# The decoder


def test_without_target_time_every_lead_time_starts_with_the_same_output():
    model = built("model.decoder.target_time=false", "model.decoder.zero_head=false", random=False)
    batch = tiny_batch(tiny_layout())
    output = model(batch)["forecast"]
    assert output.abs().max() > 1e-3
    torch.testing.assert_close(output, output[:, :1].expand_as(output))
    for head in model.decoder["forecast"].film.heads:
        torch.nn.init.normal_(head.weight)
    assert (model(batch)["forecast"][:, 0] - output[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("film", ("shared", "per_block"))
def test_lead_times_decode_together_as_they_do_alone_and_in_any_order(film):
    layout = tiny_layout()
    model, batch = built(f"model.decoder.film={film}", layout=layout), tiny_batch(layout)
    together = model(batch)["forecast"]
    for order in ([0], [2, 1], [1, 1, 0]):
        some = replace(batch, targets={"forecast": batch.targets["forecast"].of_frames(order)})
        torch.testing.assert_close(model(some)["forecast"], together[:, order], rtol=1e-4, atol=1e-5)


def test_samples_have_lead_times_of_their_own():
    layout = tiny_layout()
    model, batch = built(layout=layout), tiny_batch(layout)
    target = batch.targets["forecast"]
    whole = model(batch)["forecast"]
    rows, leads = torch.arange(2)[:, None], torch.tensor([[0, 2], [1, 0]])
    drawn = replace(
        target,
        values=target.values[rows, leads],
        times=target.times[rows, leads],
        second_of_day=target.second_of_day[rows, leads],
        day_of_year=target.day_of_year[rows, leads],
        reference=None,
    )
    output = model(replace(batch, targets={"forecast": drawn}))["forecast"]
    torch.testing.assert_close(output, whole[rows, leads], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", (GLOBAL, COARSE, STATIONS))
def test_chunks_and_chosen_places_decode_as_the_whole(grid):
    layout = tiny_layout(GLOBAL, gaps=True, target_grid=grid)
    batch = tiny_batch(layout)
    whole = built(layout=layout)(batch)["forecast"]
    model = built("model.decoder.chunk_size=4", layout=layout)
    torch.testing.assert_close(model(batch)["forecast"], whole, rtol=1e-4, atol=1e-5)
    places = model.draw_places(0.5)["forecast"]
    some = model(replace(batch, places={"forecast": places}))["forecast"]
    torch.testing.assert_close(some, whole.flatten(3)[..., places], rtol=1e-4, atol=1e-5)


def test_the_decoder_equals_its_formula_in_double_precision():
    layout = tiny_layout()
    decoder = built("model.decoder.features=0", "model.calendar=none", layout=layout).decoder["forecast"].double()
    query = tiny_batch(layout).queries()["forecast"]
    latents = Latents(tokens=torch.randn(2, 1, 6, 16, dtype=torch.float64), times=query.times[:, :1])
    moment = decoder.lead_time(decoder.lead_features(query.lead_time).double())
    films = decoder.film(query.lead_time)
    for lead in range(len(LEADS)):
        x = decoder.position(decoder.places.double())[None] + moment[:, lead, None]
        for layer in decoder.layers:
            film = films.of(layer)
            scale, shift = film.attention_scale[:, lead, None], film.attention_shift[:, lead, None]
            prepared = layer.prepare(latents.tokens.flatten(1, 2), num_queries=1)
            y = x + layer.attention((1 + scale) * layer.query_norm(x) + shift, prepared)
            scale, shift = film.mlp_scale[:, lead, None], film.mlp_shift[:, lead, None]
            x = y + layer.mlp((1 + scale) * layer.mlp_norm(y) + shift)
        wanted = decoder.head(x).transpose(1, 2).unflatten(2, GLOBAL.shape)
        torch.testing.assert_close(decoder(latents, query)[:, lead], wanted)


def test_it_reads_every_latent():
    layout = tiny_layout()
    model, batch = built(layout=layout), tiny_batch(layout)
    latents = model.encoder(batch)
    tokens = latents.tokens.detach().requires_grad_()
    model.decoder["forecast"](latents.with_tokens(tokens), batch.queries()["forecast"])[:, 1].sum().backward()
    assert (tokens.grad.abs().sum(dim=-1) > 0).all()


def test_wrong_options_are_refused_with_what_to_type():
    for option in ("num_cross=0", "film=own", "lead_features=sine", "film_hidden=0", "chunk_size=0", "features=2"):
        with pytest.raises(ValueError, match=r"use|must be"):
            build_from_config(compose([*TINY, f"model.decoder.{option}"]), tiny_layout())


def test_lead_times_beyond_the_trained_range_are_warned_of():
    layout = tiny_layout()
    model, batch = built(layout=layout), tiny_batch(tiny_layout(leads=(6 * HOUR, 96 * HOUR)))
    with pytest.warns(UserWarning, match=r"lead time of 96 h .* trained on \(6 h to 72 h\)"):
        model(batch)
    drawn = replace(layout.targets["forecast"], trained=(12 * HOUR, 24 * HOUR))
    model = built(layout=replace(layout, targets={"forecast": drawn}))
    with pytest.warns(UserWarning, match=r"lead times of 6 h and 72 h .* trained on \(12 h to 24 h\)"):
        model(tiny_batch(layout))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built(layout=layout)(tiny_batch(layout))


# Every part knows the lead time


ENCODERS = ("perceiver", "hierarchical_perceiver", "grid_patch", "video_patch")
PROCESSORS = ("latent_transformer", "spatial_transformer", "video_dit", "identity")
EVERY = ["+model/condition=all", "model.observation_heads=2"]


def metnet(encoder: str, processor: str, *given: str, layout=None, random: bool = True):
    parts = [f"model/encoder={encoder}", f"model/processor={processor}"]
    return built(*parts, *EVERY, *given, layout=layout, random=random)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_lead_time_has_an_encoding_of_its_own(encoder, processor):
    layout = tiny_layout(gaps=True)
    model, batch = metnet(encoder, processor, layout=layout), tiny_batch(layout)
    together = model(batch)["forecast"]
    assert together.shape == batch.targets["forecast"].values.shape
    alone = replace(batch, targets={"forecast": batch.targets["forecast"].of_frames([1])})
    torch.testing.assert_close(model(alone)["forecast"], together[:, [1]], rtol=1e-4, atol=1e-5)
    first, last = (model._latents(batch, model.film(batch.queries()["forecast"].lead_time[:, i])) for i in (0, 2))
    assert (first.tokens - last.tokens).abs().max() > 1e-3
    together.square().sum().backward()
    for name, parameter in model.film.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_at_the_start_the_metnet_way_equals_encoding_once():
    batch = tiny_batch(tiny_layout())
    options = "model.decoder.zero_head=false"
    many = metnet("perceiver", "latent_transformer", options, random=False)
    once = built(options, random=False)
    once.load_state_dict({name: value for name, value in many.state_dict().items() if not name.startswith("film.")})
    torch.testing.assert_close(many(batch)["forecast"], once(batch)["forecast"])


def test_film_reaches_every_layer_of_every_part():
    for encoder, processor in itertools.product(ENCODERS, PROCESSORS[:3]):
        model = metnet(encoder, processor, "model.decoder.film=per_block")
        layers = [module for module in model.modules() if hasattr(module, "film_width")]
        decoder = [layer for layer in layers if layer in set(model.decoder.modules())]
        assert len(model.film.heads) == len(layers) - len(decoder)
        assert sorted(layer.number for layer in layers if layer not in decoder) == list(range(len(model.film.heads)))


def test_the_summary_counts_the_generator_and_what_it_modulates():
    model = metnet("perceiver", "latent_transformer")
    lines = describe(model, tiny_batch(tiny_layout())).split("\n")
    row = next(line for line in lines if line.startswith("film "))
    assert "2 layers modulated" in row and f"{sum(item.numel() for item in model.film.parameters()):,}" in row


def test_observations_are_repeated_with_their_samples():
    layout = observed_layout(analysis=False)
    model, batch = metnet("hierarchical_perceiver", "latent_transformer", layout=layout), tiny_batch(layout)
    again = batch.repeated(3)
    assert len(again.observations) == 3 * len(batch.observations) and again.batch_size == 6
    for sample, lead in ((0, 0), (0, 2), (1, 1)):
        kept = again.observations.chosen(again.observations.batch == 3 * sample + lead)
        own = batch.observations.chosen(batch.observations.batch == sample)
        assert torch.equal(kept.value, own.value) and torch.equal(kept.time(), own.time())
    latents, once = model.encoder(again), model.encoder(batch)
    torch.testing.assert_close(latents.tokens[::3], once.tokens)
    torch.testing.assert_close(latents.tokens[2::3], once.tokens)


def test_what_cannot_know_a_lead_time_is_refused():
    with pytest.raises(ValueError, match=r"analysis.*use model\.condition=decoder"):
        metnet("perceiver", "latent_transformer", layout=observed_layout())
    with pytest.raises(ValueError, match=r"model\.condition=some is unknown; use decoder or all"):
        compose(["model=hip_metnet", "model.condition=some"])


SHARED = [
    (size, f"model.condition={condition}")
    for size in ("tiny", "small", "base", "production")
    for condition in ("decoder", "all")
]
PER_BLOCK = [(size, "model.decoder.film=per_block") for size in ("small", "base", "production")]


@pytest.mark.parametrize(("size", "option"), [*SHARED, *PER_BLOCK])
def test_film_takes_less_than_a_hundredth_of_the_parameters(size, option):
    with torch.device("meta"):
        model = build(["model=hip_metnet", f"model/size={size}", option], tiny_layout())
    count = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert 0 < sum(number for name, number in count.items() if "film" in name) < 0.01 * sum(count.values())


# Crops with their own coordinates


def crops(layout, whole, rows: int, columns: int, starts):
    """Windows of a batch on the whole grid, one a sample, with their places."""
    grid = layout.inputs["prognostic"].grid
    places = whole.inputs["prognostic"].grid.coordinates.unflatten(0, whole.inputs["prognostic"].grid.shape)

    def cut(field):
        cuts = [(slice(row, row + rows), slice(column, column + columns)) for row, column in starts]
        values = torch.stack([field.values[b][..., r, c] for b, (r, c) in enumerate(cuts)])
        where = torch.stack([places[cut].flatten(0, 1) for cut in cuts])
        return replace(field, values=values, grid=grid, coordinates=where, reference=None, scale=None, offset=None)

    inputs, targets = ({name: cut(field) for name, field in part.items()} for part in (whole.inputs, whole.targets))
    return Batch(inputs, targets, layout)


@pytest.mark.parametrize("encoder", ("perceiver", "hierarchical_perceiver"))
def test_crops_are_read_and_predicted_at_their_own_places(encoder):
    part = LatLonGrid(REGION.latitude[:4], REGION.longitude[:5])
    layout, elsewhere = tiny_layout(part), tiny_layout(LatLonGrid(REGION.latitude[2:6], REGION.longitude[3:8]))
    options = f"model/encoder={encoder}"
    model, moved = built(options, layout=layout), built(options, layout=elsewhere)
    whole = tiny_batch(tiny_layout(REGION))
    output = model(crops(layout, whole, 4, 5, [(0, 0), (2, 3)]))["forecast"]
    here = crops(layout, whole, 4, 5, [(0, 0), (0, 0)])
    here = replace(here, inputs={"prognostic": replace(here.inputs["prognostic"], coordinates=None)})
    here = replace(here, targets={"forecast": replace(here.targets["forecast"], coordinates=None)})
    torch.testing.assert_close(output[0], model(here)["forecast"][0], rtol=1e-4, atol=1e-5)
    there = crops(elsewhere, whole, 4, 5, [(2, 3), (2, 3)])
    torch.testing.assert_close(output[1], moved(there)["forecast"][1], rtol=1e-4, atol=1e-5)
    some = replace(crops(layout, whole, 4, 5, [(0, 0), (2, 3)]), places={"forecast": torch.tensor([7, 2])})
    torch.testing.assert_close(model(some)["forecast"], output.flatten(3)[..., [7, 2]], rtol=1e-4, atol=1e-5)


def test_parts_that_read_no_coordinates_refuse_crops():
    layout = tiny_layout(LatLonGrid(REGION.latitude[:4], REGION.longitude[:5]))
    batch = crops(layout, tiny_batch(tiny_layout(REGION)), 4, 5, [(0, 0), (2, 3)])
    for given, sentence in (
        ("model/encoder=grid_patch", "encoder=perceiver"),
        ("model/decoder=grid_patch", "lead_time"),
    ):
        with pytest.raises(ValueError, match=f"coordinates of their own.*{sentence}"):
            built(given, layout=layout)(batch)
