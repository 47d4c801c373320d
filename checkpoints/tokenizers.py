"""Read and write tokenizers: merges files, and the tokenizer/ folder of a model.

    merges.txt              one pair of symbols per line, in the order in which they were learned
    vocab.json              {token: id}; the merges determine it, so it is only checked
    tokenizer_config.json   maximum length and padding
    tokenizer.json          merges and vocabulary in one file, as transformers 5 writes them
"""

import gzip
import io
import zlib
from pathlib import Path

from files import MAX_TEXT, read_bytes, read_json, write_json, write_text
from tokenizer import BYTE_TO_CHARACTER, END, START, CLIPTokenizer

CLIP_NUM_MERGES = 49152 - 256 - 2  # CLIP uses only the first part of its merges file


def tokenizer_from_merges(path, num_merges=CLIP_NUM_MERGES, max_length=77, pad_with_end=True):
    """The tokenizer of a merges file such as CLIP's bpe_simple_vocab_16e6.txt, plain or .gz.

    Raises ValueError if the file has fewer than num_merges merges or a damaged line.
    """
    merges = read_merges(path, num_merges)
    if len(merges) < num_merges:
        raise ValueError(f"{path}: needs {num_merges} merges, got {len(merges)}")
    return _tokenizer(path, merges, max_length, pad_with_end)


def _tokenizer(path, *arguments):
    """A CLIPTokenizer whose errors name the file of its merges."""
    try:
        return CLIPTokenizer(*arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; is it complete and undamaged?") from None


def load_tokenizer(folder):
    """The tokenizer of a folder that save_tokenizer wrote, or of Stable Diffusion's tokenizer/.

    Raises ValueError if the vocabulary does not follow from the merges.
    """
    folder, settings = Path(folder), {}
    # special_tokens_map.json overrides the other file, as in transformers: in the folders of SD 2
    # only this file says that padding is id 0.
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings |= read_json(folder / name)
    pad = settings.get("pad_token") or END
    pad = pad.get("content") if isinstance(pad, dict) else pad
    first = BYTE_TO_CHARACTER[ord("!")]
    if pad not in (END, first):
        raise ValueError(f"{folder}: pad_token needs to be {END!r} or {first!r}, got {pad!r}")
    if (folder / "tokenizer.json").exists() and not (folder / "merges.txt").exists():
        source = folder / "tokenizer.json"
        merges, vocabulary = read_tokenizer_json(source)
    else:
        source = folder / "merges.txt"
        merges, vocabulary = read_merges(source), read_json(folder / "vocab.json")
    length = settings.get("model_max_length", 77)
    if type(length) is not int or not 2 <= length <= 65536:
        raise ValueError(f"{folder / 'tokenizer_config.json'}: model_max_length needs a whole "
                         f"number from 2 to 65536, got {length!r:.60}")
    tokenizer = _tokenizer(source, merges, length, pad == END)
    for token in vocabulary | tokenizer.ids:
        if vocabulary.get(token) != tokenizer.ids.get(token):
            raise ValueError(f"{folder}: vocabulary and merges disagree about {token!r}")
    return tokenizer


def save_tokenizer(folder, tokenizer):
    """Write vocab.json, merges.txt and tokenizer_config.json in transformers' format."""
    folder = Path(folder)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.ranks)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")
    write_json(folder / "vocab.json", tokenizer.ids)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.max_length,
        "bos_token": START, "eos_token": END, "unk_token": END,
        "pad_token": tokenizer.tokens[tokenizer.pad_id],
    })


def read_merges(path, num_merges=None):
    """The first num_merges pairs (or all) of a merges file, plain or .gz."""
    data = read_bytes(path)
    try:
        if str(path).endswith(".gz"):  # a small file may be gigabytes when it is unpacked
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            raise EOFError(f"more than {MAX_TEXT:,} bytes")
        text = data.decode("utf-8")
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a merges file ({error})") from None
    first, *lines = text.rstrip("\n").split("\n")
    if "#version" not in first:
        raise ValueError(f"{path}: line 1 needs to be the #version line, got {first[:40]!r}")
    return check_merges(path, [line.split() for line in lines[:num_merges]])


def read_tokenizer_json(path):
    """(merges, {token: id}) of a tokenizer.json. Raises ValueError if it has none."""
    model = read_json(path).get("model")
    model = model if isinstance(model, dict) else {}
    merges, vocabulary = model.get("merges"), model.get("vocab")
    if not (isinstance(merges, list) and isinstance(vocabulary, dict)):
        raise ValueError(f"{path}: needs merges and vocab in its model, got {list(model)}")
    # "a b" up to transformers 4.44, ["a", "b"] after that
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    return check_merges(path, merges), vocabulary


def check_merges(path, merges):
    """The merges. Raises ValueError with the number of one that is not a list of two symbols."""
    for number, pair in enumerate(merges, start=1):
        if not (isinstance(pair, list) and [type(symbol) for symbol in pair] == [str, str]):
            raise ValueError(f"{path}: merge {number} needs two symbols, got {pair!r}")
    return merges
