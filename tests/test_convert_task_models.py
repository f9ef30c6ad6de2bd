"""Weights of task models of transformers: recognised, run here, and given back under their own names."""

import pytest
import torch
import torch.nn.functional as F

from models import build
from models.convert import TARGET, convert, export, recognise, token_batch

TASK_CONFIG = {"num_self_attends_per_block": 1, "num_self_attention_heads": 2, "num_cross_attention_heads": 2}


READ = {"transformers_image": 261, "transformers_image_learned": 12, "transformers_flow": 264}


def task_state(kind: str, width: int = 8, vocabulary: int = 5, length: int = 4) -> dict:
    """Random weights by the names of a task model."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def linear(prefix, *shape):
        return {f"{prefix}.weight": random(*shape), f"{prefix}.bias": random(shape[0])}

    def layer(prefix, query, context=None):
        middle, parts = context or query, "attention.self"
        state = linear(f"{prefix}.{parts}.layernorm1", query) | linear(f"{prefix}.layernorm", query)
        state |= linear(f"{prefix}.{parts}.layernorm2", context) if context else {}
        for part in ("key", "value"):
            state |= linear(f"{prefix}.{parts}.{part}", width, middle)
        state |= linear(f"{prefix}.{parts}.query", width, query)
        state |= linear(f"{prefix}.attention.output.dense", query, width)
        return state | linear(f"{prefix}.mlp.dense1", query, query) | linear(f"{prefix}.mlp.dense2", query, query)

    read, text = "perceiver.input_preprocessor", kind.startswith("transformers_text")
    decoder = "perceiver.decoder" if kind == "transformers_text" else "perceiver.decoder.decoder"
    context = READ.get(kind, width)
    asked = context if kind == "transformers_flow" else width
    state = {"perceiver.embeddings.latents": random(3, width)}
    state |= layer("perceiver.encoder.cross_attention", width, context)
    state |= layer("perceiver.encoder.self_attends.0", width)
    state |= layer(f"{decoder}.decoding_cross_attention", asked, width)
    if text:
        state[f"{read}.embeddings.weight"], state[f"{read}.position_embeddings.weight"] = (
            random(vocabulary, width),
            random(length, width),
        )
    elif kind == "transformers_flow":
        state |= linear(f"{read}.conv_after_patches", 6, 10)
    elif kind == "transformers_image_learned":
        state |= linear(f"{read}.convnet_1x1", 6, 3, 1, 1) | linear(f"{read}.positions_projection", 6, 6)
        state[f"{read}.position_embeddings.position_embeddings"] = random(16, 6)
    if kind != "transformers_flow":
        queries = length if kind == "transformers_text" else 1
        state[f"{decoder}.output_position_encodings.position_embeddings"] = random(queries, width)
    if kind == "transformers_text":
        return state | {"embedding_decoder.bias": random(vocabulary)}
    return state | linear(f"{decoder}.final_layer", 2, asked)


GIVEN = {  # what each reads, and what it returns
    "transformers_text": (F.one_hot(torch.tensor([[0, 3, 1, 4]]), 5).float(), (1, 1, 5, 4)),
    "transformers_text_classes": (F.one_hot(torch.tensor([[0, 3, 1, 4]]), 5).float(), (1, 1, 2, 1)),
    "transformers_image": (torch.randn(1, 4, 6, 3), (1, 1, 2, 1)),
    "transformers_image_learned": (torch.randn(1, 4, 4, 3), (1, 1, 2, 1)),
    "transformers_flow": (torch.randn(1, 3, 5, 10), (1, 1, 2, 3, 5)),
}


@pytest.mark.parametrize("source", GIVEN)
def test_task_models_are_recognised_run_and_get_their_names_back(source):
    state, (given, shape) = task_state(source), GIVEN[source]
    assert recognise(state) == source
    config = TASK_CONFIG | {"train_size": (3, 5)}
    overrides, layout, weights = convert(source, state, config, num_tokens=tuple(given.shape[1:-1]))
    model = build(overrides, layout).eval()
    model.load_state_dict(weights)
    output = model(token_batch(layout, given))[TARGET]
    assert output.shape == shape
    returned = export(source, model, config)
    assert set(returned) == set(state) and all(torch.equal(returned[name], state[name]) for name in state)


def test_pixels_ask_for_their_flow_with_the_token_that_was_read_there():
    state, (given, _) = task_state("transformers_flow"), GIVEN["transformers_flow"]
    config = TASK_CONFIG | {"train_size": (3, 5)}
    overrides, layout, weights = convert("transformers_flow", state, config)
    model, batch = build(overrides, layout), token_batch(layout, given)
    model.load_state_dict(weights)
    read, _ = model.encoder.inputs["tokens"](batch.inputs["tokens"], batch.base_time)
    torch.testing.assert_close(model.decoder[TARGET].place_queries(batch.queries()[TARGET]), read[:, 0])
    assert [variable.units for variable in layout.targets[TARGET].variables] == ["0.01 pixels"] * 2
    torch.nn.init.ones_(model.decoder[TARGET].feature.bias)
    with pytest.raises(ValueError, match="asks with the tokens that it reads, and the model's queries differ"):
        export("transformers_flow", model, config)


@pytest.mark.parametrize(
    ("name", "why"),
    (("convnet.conv.weight", "a convolution with batch norm and pooling"), ("modalities.audio.x", "one modality")),
)
def test_task_models_without_a_part_here_are_refused(name, why):
    with pytest.raises(ValueError, match=why) as error:
        recognise({f"perceiver.input_preprocessor.{name}": 0})
    assert "\n" not in str(error.value)


def test_a_read_out_trained_apart_from_its_embedding_is_refused():
    overrides, layout, weights = convert("transformers_text", task_state("transformers_text"), TASK_CONFIG)
    model = build(overrides, layout)
    model.load_state_dict(weights)
    torch.nn.init.ones_(model.decoder[TARGET].head.weight)
    with pytest.raises(ValueError, match="ties the read-out to the embedding"):
        export("transformers_text", model, TASK_CONFIG)
