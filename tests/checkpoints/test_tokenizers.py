"""Files of tokenizers: a saved tokenizer is loaded again, and a damaged file is refused by name."""

import dataclasses
import gzip
import json

import pytest
import torch
from helpers import change

from checkpoints.tokenizers import load_tokenizer, save_tokenizer, tokenizer_for
from text import PRESETS
from tokenizer import CLIPTokenizer

CAPTIONS = [
    f"A {color} {shape} moves {side}."
    for color in ("red", "green")
    for shape in ("circle", "square")
    for side in ("left", "right")
]
TEXTS = [*CAPTIONS, "", "Ünseen! " * 9]


def trained(**options):
    return CLIPTokenizer.train(CAPTIONS, num_merges=60, max_length=12, **options)


@pytest.fixture
def folder(tmp_path):
    save_tokenizer(tmp_path, trained())
    return tmp_path


def test_a_loaded_tokenizer_gives_the_same_ids(tmp_path):
    for pad_with_end in (True, False):
        tokenizer = trained(pad_with_end=pad_with_end)
        save_tokenizer(tmp_path, tokenizer)
        assert torch.equal(load_tokenizer(tmp_path)(TEXTS), tokenizer(TEXTS))


def test_special_tokens_map_alone_sets_the_padding_of_sd2(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "!"}}')
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_id, tokenizer.max_length) == (0, 77)


def tokenizer_json(folder, merges):
    """Replace vocab.json and merges.txt by the one file that transformers 5 writes."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


@pytest.mark.parametrize("join", [list, " ".join], ids=["pairs", "lines of transformers 4"])
def test_a_folder_with_only_tokenizer_json_gives_the_same_ids(folder, join):
    tokenizer_json(folder, [join(pair) for pair in trained().ranks])
    assert torch.equal(load_tokenizer(folder)(TEXTS), trained()(TEXTS))


def test_an_added_token_is_named(folder):
    (folder / "added_tokens.json").write_text('{"<|endoftext|>": 500, "<dog>": 600}')
    with pytest.raises(ValueError, match="has the added token '<dog>', as after textual inversion"):
        load_tokenizer(folder)
    tokenizer_json(folder, [*trained().ranks])
    change(folder / "tokenizer.json", added_tokens=[{"content": "<cat>"}])
    with pytest.raises(ValueError, match="has the added token '<cat>'"):
        load_tokenizer(folder)


def test_only_the_first_merges_of_clips_file_are_used(tmp_path):
    (tmp_path / "bpe.txt").write_text('"bpe.txt#version: 0.2\na b\nb c</w>\nnot used at all\n')
    config = dataclasses.replace(PRESETS["sd1"], vocab_size=2 * 256 + 2 + 2)
    tokenizer = tokenizer_for(tmp_path / "bpe.txt", config)
    assert list(tokenizer.ranks) == [("a", "b"), ("b", "c</w>")] and tokenizer.max_length == 77


def test_a_gz_file_is_read(tmp_path):
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(b"#version: 0.2\na b\n"))
    assert list(tokenizer_for(tmp_path / "bpe.txt.gz", PRESETS["sd1"]).ranks) == [("a", "b")]


@pytest.mark.parametrize("file, text, message", [
    ("merges.txt", "#version: 0.2\na b\nab\n", "expected 2, got 1"),
    ("merges.txt", "#version: 0.2\na bc\n", "known symbols .* got 'a' 'bc' as number 1"),
    ("merges.txt", "#version: 0.2\na b\n", "vocabulary and merges disagree about"),
    ("tokenizer_config.json", '{"model_max_length": 77.5}', "interpreted as an integer"),
])
def test_a_damaged_file_is_refused(folder, file, text, message):
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=f"{folder}: is not a whole, undamaged tok.*{message}"):
        load_tokenizer(folder)


def test_a_damaged_gz_file_is_refused(tmp_path):
    (tmp_path / "bpe.gz").write_bytes(gzip.compress(b"#version: 0.2\na b\n")[:-9])
    with pytest.raises(ValueError, match="bpe.gz: is not a whole, undamaged tokenizer"):
        tokenizer_for(tmp_path / "bpe.gz", PRESETS["sd1"])
