"""Our models against outputs that other projects computed with the same weights (float32, CPU, evaluation mode)."""

import numpy as np
import pytest
import torch

from models import build
from models.convert import SOURCES, convert, export
from tests.golden.comparisons import COMPARISONS, Golden

TOLERANCE = 2e-5  # of max(1, max |output|)
GRADIENT_TOLERANCE = 1e-4  # of the gradient's norm


@pytest.fixture
def golden(golden_file) -> Golden:
    if not golden_file.is_file():
        pytest.fail(f"{golden_file} does not exist; give a file like tests/golden/perceiver_io_hf.npz", pytrace=False)
    return Golden.read(golden_file)


@pytest.fixture
def computed(golden):
    """Our model with the source's weights, and its outputs."""
    comparison = COMPARISONS[golden.source]
    inputs = {name: torch.from_numpy(array) for name, array in golden.group("input").items()}
    num_tokens = comparison.num_tokens(inputs)
    overrides, layout, weights = convert(golden.source, golden.state, golden.config, num_tokens=num_tokens)
    model = build(overrides, layout).eval()
    model.load_state_dict(weights)
    return model, comparison.outputs(model, comparison.batch(layout, inputs, golden))


def test_outputs_equal_those_of_the_source(golden, computed):
    _, outputs = computed
    wanted = golden.group("output")
    assert wanted and set(wanted) <= set(outputs)
    for name, array in wanted.items():
        error = np.abs(outputs[name].detach().numpy() - array).max()
        assert error <= TOLERANCE * max(1.0, np.abs(array).max()), f"output {name}: largest error {error:.2e}"


def test_gradients_equal_those_of_the_source(golden, computed):
    wanted = golden.group("grad")
    if not wanted:
        pytest.skip("the file holds no gradients")
    model, outputs = computed
    output = outputs[""]
    loss = (output.flatten() * torch.linspace(-1, 1, output.numel())).sum() / output.numel()
    loss.backward()
    assert abs(loss.item() - golden.arrays["loss"]) <= TOLERANCE * max(1.0, np.abs(golden.arrays["output"]).max())
    ours = {theirs: ours for ours, theirs in SOURCES[golden.source].names(golden.config).items()}
    parameters = dict(model.named_parameters())
    for name, array in wanted.items():
        inside = name.removeprefix("perceiver.").replace("decoder.decoder.", "decoder.", 1)  # of a task model
        gradient = parameters[ours[name if name in ours else inside]].grad
        assert gradient is not None, f"{name} gets no gradient"
        error = np.linalg.norm(gradient.numpy() - array)  # must vanish where the source's gradient does
        assert error <= GRADIENT_TOLERANCE * np.linalg.norm(array), f"gradient of {name}: error {error:.2e}"


def test_weights_return_unchanged(golden):
    overrides, layout, weights = convert(golden.source, golden.state, golden.config)
    model = build(overrides, layout)
    model.load_state_dict(weights)
    returned = export(golden.source, model, golden.config)
    assert set(returned) == set(golden.state)
    for name, array in golden.state.items():
        np.testing.assert_array_equal(returned[name].numpy(), array, err_msg=name)
