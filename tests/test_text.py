"""Tokenizer against cases worked out by hand, both parts against recorded references.

Recorded with transformers 5.23, regex 2026.11 and a copy of openai/CLIP's simple_tokenizer.py less
its call of ftfy: token ids of the merges that `trained()` learns; a hash of the words that CLIP's
pattern finds around each character of Unicode 3.2 (which every Python knows; no reference is needed
for the newer ones, since they differ between Pythons); hidden states of transformers' CLIPTextModel
(attn_implementation="eager") with the weights of `filled()`.
"""

import dataclasses
import gzip
import hashlib
import json
import unicodedata

import pytest
import torch
import torch.nn.functional as F

from text import PRESETS, CLIPTextModel, CLIPTokenizer, TextConfig, quick_gelu, standardise
from tokenizer import split_words

CAPTIONS = [
    f"A {color} {shape} moves {side}."
    for color in ("red", "green")
    for shape in ("circle", "square")
    for side in ("left", "right")
]
A, B, C = (ord(letter) - ord("!") for letter in "abc")  # "!" is the first visible byte: id 0
ENDING = 256  # added to the id of a byte that ends a word


def trained(**options):
    return CLIPTokenizer.train(CAPTIONS, num_merges=60, max_length=12, **options)


@pytest.fixture
def folder(tmp_path):
    trained().save(tmp_path)
    return tmp_path


# Words


@pytest.mark.parametrize(
    "text, words",
    [
        ("", []),
        (" \t\n\u3000 ", []),
        ("A  Red\nSquare.", ["a", "red", "square", "."]),
        ("it's they'LL '90s", ["it", "'s", "they", "'ll", "'", "9", "0", "s"]),
        ("don't!'s", ["don", "'t", "!'", "s"]),  # a run of signs swallows the apostrophe
        ("2024 ½ⅷ", ["2", "0", "2", "4", "½", "ⅷ"]),
        ("&amp;lt;b&gt;", ["<", "b", ">"]),  # resolved twice
        ("cafe\u0301", ["cafe", "\u0301"]),  # a combining mark is no letter
        ("x\x1cy\x1c", ["x", "\x1c", "y"]),  # no white space inside, yet stripped at the end
        ("a\u0345b", ["a", "b"]),
        ("Straße 赤い丸", ["straße", "赤い丸"]),
        ("a<|EndOfText|>b", ["a", "<|endoftext|>", "b"]),
    ],
)
def test_words_are_those_found_by_hand(text, words):
    assert split_words(text) == words


def test_words_equal_clips_pattern_around_every_character_of_unicode_3_2():
    digest = hashlib.sha256()
    for character in map(chr, range(0x110000)):
        if unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs", "Co"):
            words = split_words(f"a{character}b'{character}1")
            digest.update("\0".join([*words, "\n"]).encode())
    recorded = "4f56f3c4ca86b282573664239a1497e1c7122d2afdf6afada1974adf59ec607d"
    assert digest.hexdigest() == recorded


# Merges


def test_bytes_without_merges_keep_clips_order():
    assert CLIPTokenizer([]).encode("a b¡ ") == [A + ENDING, B + ENDING, 126, 94 + ENDING]  # C2 A1


def test_the_merge_learned_first_is_applied_first():
    early_bc = CLIPTokenizer([("b", "c</w>"), ("a", "b")])
    early_ab = CLIPTokenizer([("a", "b"), ("b", "c</w>")])
    assert early_bc.encode("abc") == [A, 512]
    assert early_ab.encode("abc") == [512, C + ENDING]


def test_a_merge_joins_runs_from_the_left():
    assert CLIPTokenizer([("a", "a")]).encode("aaaab") == [512, 512, B + ENDING]


def test_training_learns_the_most_frequent_pair_then_the_first_in_code_point_order():
    tokenizer = CLIPTokenizer.train(["zx cd", "zx ab", "ab zx cd"], num_merges=3)
    assert list(tokenizer.ranks) == [("z", "x</w>"), ("a", "b</w>"), ("c", "d</w>")]


def test_training_counts_a_repeated_caption_each_time():
    tokenizer = CLIPTokenizer.train(["ab", "cd", "cd"], num_merges=1)
    assert list(tokenizer.ranks) == [("c", "d</w>")]


def test_training_stops_when_no_pair_is_left():
    assert CLIPTokenizer.train(["abc"], num_merges=100).vocab_size == 512 + 2 + 2


def test_training_learns_nothing_from_start_and_end():
    assert not CLIPTokenizer.train(["<|startoftext|> <|endoftext|>"], num_merges=9).ranks


def test_every_trained_caption_becomes_one_token_per_word():
    tokenizer = CLIPTokenizer.train(CAPTIONS, num_merges=1000)
    assert len(tokenizer.encode("a green square moves right.")) == 6


def test_ids_equal_those_of_clips_own_code():
    encode = trained().encode
    assert encode("A red circle moves left.") == [320, 536, 523, 515, 532, 269]
    assert encode("It's 10 green&amp;blue CAFÉS!") == [
        72, 339, 6, 338, 272, 271, 530, 261, 65, 75, 84, 324, 66, 64, 69, 127, 102, 338, 256,
    ]
    assert encode("we'll \U0001f600") == [86, 324, 6, 75, 331, 172, 253, 246, 478]


# Ids of fixed length


def test_ids_are_start_text_end_and_end_again_as_padding():
    tokenizer = CLIPTokenizer([], max_length=6)
    assert tokenizer(["ab"]).tolist() == [[512, A, B + ENDING, 513, 513, 513]]


def test_padding_with_zero_keeps_one_end_token():
    tokenizer = CLIPTokenizer([], max_length=6, pad_with_end=False)
    assert tokenizer(["ab"]).tolist() == [[512, A, B + ENDING, 513, 0, 0]]


def test_truncation_keeps_the_end_token():
    tokenizer = CLIPTokenizer([], max_length=4)
    assert tokenizer(["a b c"]).tolist() == [[512, A + ENDING, B + ENDING, 513]]


def test_an_empty_text_is_start_and_end():
    assert CLIPTokenizer([], max_length=3)([""]).tolist() == [[512, 513, 513]]


def test_start_and_end_written_in_a_text_are_single_tokens():
    assert CLIPTokenizer([]).encode("<|StartOfText|><|endoftext|>") == [512, 513]


def test_an_exclamation_mark_is_no_padding():
    tokenizer = CLIPTokenizer([], max_length=6, pad_with_end=False)
    assert tokenizer.decode(tokenizer(["a!"])[0]) == "a !"


def test_decode_inverts_encode_up_to_spaces():
    tokenizer = trained()
    assert tokenizer.decode(tokenizer(["Green 円\U0001f600!"])[0]) == "green 円 \U0001f600!"


def test_decode_shows_a_character_that_was_cut():
    tokenizer = CLIPTokenizer([], max_length=4)
    assert tokenizer.decode(tokenizer(["円"])[0]) == "\ufffd"


# Files


@pytest.mark.parametrize("pad_with_end", [True, False])
def test_a_loaded_tokenizer_gives_the_same_ids(tmp_path, pad_with_end):
    tokenizer = trained(pad_with_end=pad_with_end)
    tokenizer.save(tmp_path)
    texts = [*CAPTIONS, "", "Ünseen! " * 9]
    assert torch.equal(CLIPTokenizer.load(tmp_path)(texts), tokenizer(texts))


def test_special_tokens_map_tells_the_padding_of_sd2(folder):
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "!"}}')
    assert CLIPTokenizer.load(folder).pad_id == 0


def tokenizer_json(folder, merges=None, **changes):
    """Put what vocab.json and merges.txt say into the one file that transformers 5 writes."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    if merges is None:
        merges = [line.split() for line in (folder / "merges.txt").read_text().split("\n")[1:-1]]
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges} | changes
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


@pytest.mark.parametrize("join", [list, " ".join], ids=["pairs", "lines of transformers 4"])
def test_a_folder_with_only_tokenizer_json_gives_the_same_ids(folder, join):
    texts = [*CAPTIONS, "", "Ünseen! " * 9]
    tokenizer_json(folder, [join(pair) for pair in trained().ranks])
    assert torch.equal(CLIPTokenizer.load(folder)(texts), trained()(texts))


def test_tokenizer_config_tells_the_padding_of_sd2_beside_tokenizer_json(folder):
    tokenizer_json(folder)
    (folder / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    assert CLIPTokenizer.load(folder).pad_id == 0


def test_merges_file_of_clip_is_read_to_its_last_used_merge(tmp_path):
    path = tmp_path / "bpe.txt"
    path.write_text('"bpe.txt#version: 0.2\na b\nb c</w>\nnot used at all\n')
    tokenizer = CLIPTokenizer.from_merges_file(path, num_merges=2)
    assert list(tokenizer.ranks) == [("a", "b"), ("b", "c</w>")]


@pytest.mark.parametrize(
    "merges, message",
    [
        ("#version: 0.2\na b\nab\n", "line 3 needs two symbols, got 'ab'"),
        ("#version: 0.2\na b\n\nb c\n", "line 3 needs two symbols, got ''"),
        ("#version: 0.2\na bc\n", "known symbols .* got 'a' 'bc' as number 1"),
        ("#version: 0.2\na b\na b\n", "known symbols .* as number 2"),
        ("a b\n", "#version"),
    ],
)
def test_a_damaged_merges_file_is_refused(folder, merges, message):
    (folder / "merges.txt").write_text(merges)
    with pytest.raises(ValueError, match=message):
        CLIPTokenizer.load(folder)


def test_a_vocabulary_of_other_merges_is_refused(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary |= {"red</w>": vocabulary["square</w>"], "square</w>": vocabulary["red</w>"]}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="disagree about '(red|square)</w>'"):
        CLIPTokenizer.load(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab": {"a": 64}}, "disagree about"),
        ({"merges": [["r", "e"]]}, "disagree about"),
        ({"merges": [["r", "e"], ["abc"]]}, r"merge 2 needs two symbols, got \['abc'\]"),
        ({"merges": ["r e d"]}, "merge 1 needs two symbols"),
        ({"merges": [[1, 2]]}, "merge 1 needs two symbols"),
        ({"merges": [None]}, "merge 1 needs two symbols, got None"),
        ({"merges": {}}, "needs merges and vocab"),
        ({"vocab": [["a", -1.0]]}, "needs merges and vocab"),  # of another kind, Unigram
    ],
)
def test_a_damaged_tokenizer_json_is_refused(folder, changes, message):
    tokenizer_json(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        CLIPTokenizer.load(folder)
    assert str(folder) in str(caught.value)


def test_a_tokenizer_json_without_a_model_is_refused(folder):
    (folder / "merges.txt").unlink()
    (folder / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(ValueError, match="needs merges and vocab"):
        CLIPTokenizer.load(folder)


def test_an_unknown_pad_token_is_refused(folder):
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    with pytest.raises(ValueError, match=r"pad_token .* got '\[PAD\]'"):
        CLIPTokenizer.load(folder)


def test_a_merges_file_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "bpe.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(ValueError, match="needs 48894 merges, got 1"):
        CLIPTokenizer.from_merges_file(tmp_path / "bpe.txt")


def test_a_damaged_gz_file_is_refused(tmp_path):
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(b"#version: 0.2\na b\n")[:-9])
    with pytest.raises(ValueError, match="not a merges file"):
        CLIPTokenizer.from_merges_file(tmp_path / "bpe.txt.gz")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: CLIPTokenizer.train([], 9), "captions is empty"),
        (lambda: CLIPTokenizer.train(["a", None], 9), r"captions\[1\] .* NoneType"),
        (lambda: CLIPTokenizer([])("a red square"), "texts needs a list of str, got str"),
        (lambda: CLIPTokenizer([])(["a", 7]), r"texts\[1\] .* int"),
        (lambda: CLIPTokenizer([], max_length=1), "max_length .* got 1"),
        (lambda: CLIPTokenizer([]).decode([514]), r"0\.\.513, got 514"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Text encoder

CONFIG = TextConfig(11, 8, 12, 2, 2, 5)
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


@torch.no_grad()
def test_a_token_does_not_see_later_tokens():
    model, changed = filled(CONFIG), IDS.clone()
    changed[0, 3:] = torch.tensor([1, 2])
    same = (model(IDS) == model(changed)).all(-1)
    assert same.tolist() == [[True, True, True, False, False]]


@torch.no_grad()
def test_a_token_sees_every_token_before_it():
    model, changed = filled(CONFIG), IDS.clone()
    changed[0, 0] = 1
    assert (model(IDS) != model(changed)).any(-1).all()


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


@pytest.mark.parametrize("preset, count", [("sd1", 123_060_480), ("sd2", 340_387_840)])
def test_presets_of_stable_diffusion_have_its_number_of_parameters(preset, count):
    with torch.device("meta"):  # without memory for the values
        model = CLIPTextModel(PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@torch.no_grad()
def test_standardised_last_tokens_have_mean_0_and_variance_1_in_every_channel():
    ids = trained()(CAPTIONS)
    torch.manual_seed(0)
    encoder = CLIPTextModel(PRESETS["tiny"])
    standardise(encoder, ids)
    last = encoder(ids)[:, -1]
    torch.testing.assert_close(last.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(last.std(0), torch.ones(64), atol=1e-4, rtol=0)


@torch.no_grad()
def test_standardised_new_models_tell_captions_apart_by_the_last_token():
    ids = trained()(CAPTIONS)
    torch.manual_seed(0)
    encoder = CLIPTextModel(PRESETS["tiny"])
    before = F.cosine_similarity(*encoder(ids)[:2, -1], dim=0)  # left and right
    standardise(encoder, ids)
    after = F.cosine_similarity(*encoder(ids)[:2, -1], dim=0)
    assert before > 0.95 and after < 0.75  # they share two of three words


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.tensor([[1, 11]]), r"0\.\.10, got 1\.\.11"),
        (torch.tensor([[-1, 2]]), r"0\.\.10, got -1\.\.2"),
        (torch.zeros(1, 6, dtype=torch.int64), r"n <= 5, got \[1, 6\]"),
        (torch.tensor([1, 2]), r"\(b, n\)"),
    ],
)
def test_ids_that_the_model_has_not_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        CLIPTextModel(CONFIG)(ids)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_attention_heads": 3}, "num_attention_heads needs to divide .* got 3 and 8"),
        ({"hidden_act": "relu"}, "hidden_act .* got 'relu'"),
        ({"vocab_size": 0}, "vocab_size needs to be positive"),
    ],
)
def test_an_impossible_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
