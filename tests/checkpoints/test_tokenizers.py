"""Files of tokenizers: a saved tokenizer is loaded again, and a damaged file is refused by name."""

import dataclasses
import gzip
import json

import pytest
import torch

from checkpoints.tokenizers import load_tokenizer, save_tokenizer, tokenizer_for
from text import PRESETS
from tokenizer import CLIPTokenizer

CAPTIONS = [
    f"A {color} {shape} moves {side}."
    for color in ("red", "green")
    for shape in ("circle", "square")
    for side in ("left", "right")
]


def trained(**options):
    return CLIPTokenizer.train(CAPTIONS, num_merges=60, max_length=12, **options)


@pytest.fixture
def folder(tmp_path):
    save_tokenizer(tmp_path, trained())
    return tmp_path


@pytest.mark.parametrize("pad_with_end", [True, False])
def test_a_loaded_tokenizer_gives_the_same_ids(tmp_path, pad_with_end):
    tokenizer = trained(pad_with_end=pad_with_end)
    save_tokenizer(tmp_path, tokenizer)
    texts = [*CAPTIONS, "", "Ünseen! " * 9]
    assert torch.equal(load_tokenizer(tmp_path)(texts), tokenizer(texts))


def test_special_tokens_map_alone_sets_the_padding_of_sd2(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "!"}}')
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_id, tokenizer.max_length) == (0, 77)


def tokenizer_json(folder, merges=None, **changes):
    """Replace vocab.json and merges.txt by the one file that transformers 5 writes."""
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
    assert torch.equal(load_tokenizer(folder)(texts), trained()(texts))


def test_tokenizer_config_sets_the_padding_beside_tokenizer_json(folder):
    tokenizer_json(folder)
    (folder / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    assert load_tokenizer(folder).pad_id == 0


def test_only_the_first_merges_of_clips_file_are_used(tmp_path):
    (tmp_path / "bpe.txt").write_text('"bpe.txt#version: 0.2\na b\nb c</w>\nnot used at all\n')
    config = dataclasses.replace(PRESETS["sd1"], vocab_size=2 * 256 + 2 + 2)
    tokenizer = tokenizer_for(tmp_path / "bpe.txt", config)
    assert list(tokenizer.ranks) == [("a", "b"), ("b", "c</w>")] and tokenizer.max_length == 77


def test_a_gz_file_is_read_and_a_damaged_one_refused(tmp_path):
    data = gzip.compress(b"#version: 0.2\na b\n")
    (tmp_path / "bpe.txt.gz").write_bytes(data)
    assert list(tokenizer_for(tmp_path / "bpe.txt.gz", PRESETS["sd1"]).ranks) == [("a", "b")]
    (tmp_path / "bpe.txt.gz").write_bytes(data[:-9])
    with pytest.raises(ValueError, match="bpe.txt.gz: not a merges file"):
        tokenizer_for(tmp_path / "bpe.txt.gz", PRESETS["sd1"])


@pytest.mark.parametrize("merges, message", [
    ("#version: 0.2\na b\nab\n", "expected 2, got 1"),
    ("#version: 0.2\na bc\n", "known symbols .* got 'a' 'bc' as number 1"),
    ("#version: 0.2\na b\na b\n", "known symbols .* as number 2"),
    ("a b\n", "#version"),
])
def test_a_damaged_merges_file_is_refused(folder, merges, message):
    (folder / "merges.txt").write_text(merges)
    with pytest.raises(ValueError, match=f"{folder}.*: .*{message}"):
        load_tokenizer(folder)


def test_a_vocabulary_of_other_merges_is_refused(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary |= {"red</w>": vocabulary["square</w>"], "square</w>": vocabulary["red</w>"]}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="disagree about '(red|square)</w>'"):
        load_tokenizer(folder)


@pytest.mark.parametrize("changes, message", [
    ({"merges": [["r", "e"]]}, "disagree about"),
    ({"merges": [["r", "e"], ["abc"]]}, "expected 2, got 1"),
    ({"merges": [None]}, "NoneType"),
    ({"vocab": [["a", -1.0]]}, "needs a model with merges and vocab"),  # a Unigram model
])
def test_a_damaged_tokenizer_json_is_refused(folder, changes, message):
    tokenizer_json(folder, **changes)
    with pytest.raises(ValueError, match=f"{folder}.*: .*{message}"):
        load_tokenizer(folder)


def test_a_pad_token_that_no_clip_has_is_refused(folder):
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    with pytest.raises(ValueError, match=rf"{folder}: pad_token needs .* got '\[PAD\]'"):
        load_tokenizer(folder)
