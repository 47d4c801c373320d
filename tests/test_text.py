"""The text encoder, against numbers of transformers' CLIPTextModel and claims about attention.

Recorded with transformers 5.23: hidden states of its CLIPTextModel (attn_implementation="eager")
with the weights of `filled()`.
"""

import dataclasses
import itertools
import statistics

import pytest
import torch

from shapes import COMBINATIONS, caption_of
from text import PRESETS, CLIPTextModel, TextConfig, standardise
from tokenizer import CLIPTokenizer

CONFIG = TextConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=5,
)
IDS = torch.tensor([[9, 3, 0, 10, 10]])
RECORDED = {  # the first three channels of each token
    "quick_gelu": [
        [-0.82224, 2.00835, -2.2147], [-0.88224, 2.08361, -1.84652], [-0.80004, 1.00082, 2.30659],
        [-0.8374, 2.01026, -1.89548], [-0.81286, 1.79237, -2.41068],
    ],
    "gelu": [
        [-0.82109, 2.00853, -2.22679], [-0.88199, 2.08532, -1.84981], [-0.79868, 1.00267, 2.28388],
        [-0.83713, 2.0091, -1.90522], [-0.8132, 1.78944, -2.41584],
    ],
}


def filled(config):
    """A model with parameter i, in order of the names, set to cos((1 + i) * index + i)."""
    model = CLIPTextModel(config)
    state = model.state_dict()
    for i, name in enumerate(sorted(state)):
        index = torch.arange(state[name].numel(), dtype=torch.float64).reshape(state[name].shape)
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = (torch.cos((1 + i) * index + i) + around).float()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_hidden_states_equal_those_of_transformers(hidden_act):
    hidden = filled(dataclasses.replace(CONFIG, hidden_act=hidden_act))(IDS)
    expected = torch.tensor([RECORDED[hidden_act]])
    torch.testing.assert_close(hidden[:, :, :3], expected, atol=1e-4, rtol=0)


def test_names_of_the_parameters_are_those_of_transformers():
    layer = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    layer += [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    modules = [f"encoder.layers.{i}.{name}" for i in range(2) for name in layer]
    modules += ["final_layer_norm"]
    names = {f"text_model.{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    names |= {f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position")}
    assert CLIPTextModel(CONFIG).state_dict().keys() == names


@torch.no_grad()
def test_a_token_sees_itself_and_every_token_before_it():
    model = filled(CONFIG)
    for position in range(5):
        changed = IDS.clone()
        changed[0, position] = 1
        moved = (model(IDS) - model(changed)).abs().amax(-1) > 1e-5
        assert moved.tolist() == [[index >= position for index in range(5)]]


@pytest.mark.parametrize("preset, parameters, num_heads", [
    ("sd1", 123_060_480, 12), ("sd2", 340_387_840, 16), ("tiny", 167_168, 4),
    ("small", 3_433_984, 4),
])
def test_presets_have_their_number_of_parameters_and_of_heads(preset, parameters, num_heads):
    with torch.device("meta"):  # without memory for the values
        model = CLIPTextModel(PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.config.num_attention_heads == num_heads


# New models


def test_new_embeddings_have_the_small_spread_that_lets_attention_matter():
    torch.manual_seed(0)
    embeddings = CLIPTextModel(PRESETS["tiny"]).text_model.embeddings
    assert embeddings.token_embedding.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert embeddings.position_embedding.weight.std().item() == pytest.approx(0.03, rel=0.05)


def test_in_a_new_model_only_the_last_layer_mixes_tokens():
    model = CLIPTextModel(dataclasses.replace(CONFIG, num_hidden_layers=3))
    mixes = [layer.self_attn.out_proj.weight.any() for layer in model.text_model.encoder.layers]
    assert mixes == [False, False, True]


@pytest.fixture(params=[0, 1], ids="seed {}".format)
def last_tokens(request):
    """{combination: last token} of a new model for every caption of MovingShapes."""
    captions = [caption_of(*combination) for combination in COMBINATIONS]
    ids = CLIPTokenizer.train(captions, num_merges=2000, max_length=16)(captions)
    torch.manual_seed(request.param)
    encoder = CLIPTextModel(PRESETS["tiny"])
    standardise(encoder, ids)
    return dict(zip(COMBINATIONS, encoder(ids)[:, -1].detach(), strict=True))


def test_standardised_last_tokens_have_mean_0_and_variance_1_in_every_channel(last_tokens):
    last = torch.stack([*last_tokens.values()])
    torch.testing.assert_close(last.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(last.std(0), torch.ones(64), atol=1e-4, rtol=0)


def test_the_last_token_of_a_new_model_tells_any_two_words_apart(last_tokens):
    """With PyTorch's default weights, the nearest two are 4 to 12 times nearer than the others."""
    distances = {}
    for a, b in itertools.combinations(last_tokens, 2):
        words = {*a} ^ {*b}
        if len(words) == 2:  # two captions that differ in one word
            distance = (last_tokens[a] - last_tokens[b]).square().mean().item()
            distances.setdefault(frozenset(words), []).append(distance)
    means = [statistics.mean(values) for values in distances.values()]
    assert len(means) == 15 + 3 + 6  # pairs of colours, of shapes, of directions
    assert min(means) > 0.27 * max(means)


# Mistakes


@pytest.mark.parametrize("change, message", [
    ({"num_attention_heads": 3}, "hidden_size 8 needs to be a multiple of num_attention_heads 3"),
    ({"hidden_act": "relu"}, "hidden_act one of .* got 'relu'"),
])
def test_an_impossible_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
