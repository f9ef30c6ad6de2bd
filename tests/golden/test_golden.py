"""Our models against outputs that other projects computed with the same weights (float32, CPU, evaluation mode)."""

import json

import numpy as np
import pytest
import torch

from models import build
from models.convert import TARGET, convert, export, recognise, token_batch

TOLERANCE = 2e-5  # of max(1, max |output|)


@pytest.fixture
def golden(golden_file):
    if not golden_file.is_file():
        pytest.fail(f"{golden_file} does not exist; give a file like tests/golden/perceiver_io_hf.npz", pytrace=False)
    with np.load(golden_file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    state = {name.removeprefix("state/"): array for name, array in arrays.items() if name.startswith("state/")}
    return state, json.loads(str(arrays["config"])), arrays


def test_outputs_equal_those_of_the_source(golden):
    state, config, arrays = golden
    tokens = torch.from_numpy(arrays["input/x"])
    overrides, layout, weights = convert(recognise(state), state, config, num_tokens=tokens.shape[1])
    model = build(overrides, layout).eval()
    model.load_state_dict(weights)
    batch = token_batch(layout, tokens, _keep(arrays))
    with torch.no_grad():
        latents = model.processor(model.encoder(batch)).tokens[:, 0]
        logits = model(batch)[TARGET][:, 0].transpose(1, 2)
    compared = {"latents": latents, "logits": logits}
    wanted = {name.split("/")[-1]: array for name, array in arrays.items() if name.startswith("output")}
    if list(wanted) == ["output"]:
        wanted = {"logits": wanted["output"]}
    assert wanted and set(wanted) <= set(compared)
    for name, array in wanted.items():
        error = np.abs(compared[name].numpy() - array).max()
        assert error <= TOLERANCE * max(1.0, np.abs(array).max()), f"{name}: largest error {error:.2e}"


def test_weights_return_unchanged(golden):
    state, config, _ = golden
    source = recognise(state)
    overrides, layout, weights = convert(source, state, config)
    model = build(overrides, layout)
    model.load_state_dict(weights)
    returned = export(source, model, config)
    assert set(returned) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(returned[name].numpy(), array, err_msg=name)


def _keep(arrays) -> torch.Tensor | None:
    """(B, M) bool, True = keep: krasserm's pad mask means the opposite."""
    if "input/pad_mask" in arrays:
        return ~torch.from_numpy(arrays["input/pad_mask"]).bool()
    return torch.from_numpy(arrays["input/valid"]).bool() if "input/valid" in arrays else None
