"""Our model against statistics of the stages of ClimaNet's, whose weights and inputs follow from a rule.

The newer ClimaNet has no such file: `tests/test_climanet.py` compares with its specification in float64.
"""

import json

import pytest
import torch
from torch.testing import assert_close

from models.convert import climanet
from tests.climanet_reference import batch_of, filled_state, golden_sample, our_model

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def described(stages_file) -> list[dict]:
    if not stages_file.is_file():
        pytest.fail(f"{stages_file} does not exist; give a file like tests/golden/climanet_stages.json", pytrace=False)
    return list(json.loads(stages_file.read_text()).values())


def test_stages_equal_those_of_the_source(described):
    for entry in described:
        sample = golden_sample()
        model, layout = our_model(entry["config"], filled_state(entry["config"]))
        with torch.no_grad():
            stages = our_stages(model, layout, sample)
        assert set(entry["stages"]) <= set(stages)
        for name, wanted in entry["stages"].items():
            stage = stages[name]
            assert list(stage.shape) == wanted["shape"], name
            found = {"mean": stage.mean(), "abs_mean": stage.abs().mean()}
            found |= {"first": stage.flatten()[:4], "last": stage.flatten()[-4:]}
            for statistic, value in found.items():
                assert_close(value, torch.tensor(wanted[statistic]), **CLOSE)
        assert_close(stages["decoder"].sum(), torch.tensor(entry["out_sum"]), **CLOSE)
        assert (
            bool((stages["decoder"][sample.land[:, None].expand_as(stages["decoder"])] == 0).all())
            == entry["land_zero"]
        )


def our_stages(model, layout, sample) -> dict[str, torch.Tensor]:
    """What our parts compute, in the source's axes and with its positions added where it adds them."""
    encoder, batch = model.encoder, batch_of(layout, sample)
    everything = batch_of(layout, sample, padded=False)  # the source encodes padded days like others
    tokens = encoder._tokens(encoder._patches(everything))  # (B, M, N, T, D)
    latents = encoder(batch)
    spatial = model.processor(latents)
    output = model(batch)[climanet.TARGET]
    return {
        "encoder": tokens.transpose(2, 3).flatten(2, 3).flatten(0, 1),
        "temporal": latents.tokens - (0 if encoder.places is None else encoder.places),
        "spatial_tr": spatial.tokens.flatten(0, 1),
        "decoder": output[:, :, 0],
    }
