"""The text encoder, against numbers of transformers' CLIPTextModel and claims about attention.

Recorded with transformers 5.23: hidden states of its CLIPTextModel (attn_implementation="eager")
with the weights of `filled()`.
"""

import dataclasses
import itertools
import statistics

import pytest
import torch
import torch.nn.functional as F

from shapes import COMBINATIONS, caption_of
from text import PRESETS, CLIPTextModel, TextConfig, quick_gelu, standardise
from tokenizer import CLIPTokenizer

CONFIG = TextConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=5,
)
CAPTIONS = [
    f"A {color} {shape} moves {side}."
    for color in ("red", "green") for shape in ("circle", "square") for side in ("left", "right")
]
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


@pytest.mark.parametrize("position", range(5))
@torch.no_grad()
def test_a_token_sees_itself_and_every_token_before_it(position):
    model, changed = filled(CONFIG), IDS.clone()
    changed[0, position] = 1
    moved = (model(IDS) - model(changed)).abs().amax(-1) > 1e-5
    assert moved.tolist() == [[index >= position for index in range(5)]]


def test_names_of_the_parameters_are_those_of_transformers():
    layer = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    layer += [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    modules = [f"encoder.layers.{i}.{name}" for i in range(2) for name in layer]
    modules += ["final_layer_norm"]
    names = {f"text_model.{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    names |= {f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position")}
    assert CLIPTextModel(CONFIG).state_dict().keys() == names


def test_quick_gelu_at_a_point_worked_out_by_hand():
    # 1.702 x = ln 3 makes the sigmoid 3/4
    x = torch.tensor(3.0, dtype=torch.float64).log() / 1.702
    torch.testing.assert_close(quick_gelu(x), 0.75 * x)


@pytest.mark.parametrize("preset, count", [
    ("sd1", 123_060_480), ("sd2", 340_387_840), ("tiny", 167_168), ("small", 3_433_984),
])
def test_presets_have_their_number_of_parameters(preset, count):
    with torch.device("meta"):  # without memory for the values
        model = CLIPTextModel(PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_new_embeddings_have_the_small_spread_that_lets_attention_matter():
    torch.manual_seed(0)
    embeddings = CLIPTextModel(PRESETS["tiny"]).text_model.embeddings
    assert embeddings.token_embedding.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert embeddings.position_embedding.weight.std().item() == pytest.approx(0.03, rel=0.05)


@torch.no_grad()
def test_standardised_last_tokens_have_mean_0_and_variance_1_in_every_channel():
    ids = CLIPTokenizer.train(CAPTIONS, num_merges=60, max_length=12)(CAPTIONS)
    torch.manual_seed(0)
    encoder = CLIPTextModel(PRESETS["tiny"])
    standardise(encoder, ids)
    last = encoder(ids)[:, -1]
    torch.testing.assert_close(last.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(last.std(0), torch.ones(64), atol=1e-4, rtol=0)


@torch.no_grad()
def test_standardised_new_models_tell_captions_apart_by_the_last_token():
    ids = CLIPTokenizer.train(CAPTIONS, num_merges=60, max_length=12)(CAPTIONS)
    torch.manual_seed(0)
    encoder = CLIPTextModel(PRESETS["tiny"])
    before = F.cosine_similarity(*encoder(ids)[:2, -1], dim=0)  # left and right
    standardise(encoder, ids)
    after = F.cosine_similarity(*encoder(ids)[:2, -1], dim=0)
    assert before > 0.95 and after < 0.75  # three of four words are the same


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_any_two_words_are_told_apart_by_the_last_token_of_a_new_model(seed):
    """With PyTorch's default weights, the nearest two are 4 to 12 times nearer than the others."""
    captions = [caption_of(*combination) for combination in COMBINATIONS]
    ids = CLIPTokenizer.train(captions, num_merges=2000, max_length=16)(captions)
    torch.manual_seed(seed)
    encoder = CLIPTextModel(PRESETS["tiny"])
    standardise(encoder, ids)
    last, distances = dict(zip(COMBINATIONS, encoder(ids)[:, -1], strict=True)), {}
    for a, b in itertools.combinations(last, 2):
        words = {*a} ^ {*b}
        if len(words) == 2:  # two captions that differ in one word
            distance = (last[a] - last[b]).square().mean().item()
            distances.setdefault(frozenset(words), []).append(distance)
    means = [statistics.mean(values) for values in distances.values()]
    assert len(means) == 15 + 3 + 6  # pairs of colours, of shapes, of directions
    assert min(means) > 0.27 * max(means)


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.zeros(1, 6, dtype=torch.int64), r"n <= 5, got \[1, 6\]"),
        (torch.tensor([1, 2]), r"\(b, n\)"),
    ],
)
def test_ids_that_do_not_fit_the_model_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        CLIPTextModel(CONFIG)(ids)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_attention_heads": 3}, "num_attention_heads needs to divide hidden_size 8, got 3"),
        ({"hidden_act": "relu"}, "hidden_act .* got 'relu'"),
        ({"vocab_size": 0}, "vocab_size needs to be positive"),
    ],
)
def test_an_impossible_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
