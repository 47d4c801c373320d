"""Read and write tokenizers: merges files, and the tokenizer/ folder of a model.

    merges.txt              one pair of symbols per line, in the order in which they were learned
    vocab.json              {token: id}; the merges determine it, so it is only compared
    tokenizer_config.json   maximum length and padding
    tokenizer.json          merges and vocabulary in one file, as transformers 5 writes them
"""

import gzip
from operator import index
from pathlib import Path

from checkpoints.errors import naming
from support.files import read_json, write_json, write_text
from tokenizer import END, START, CLIPTokenizer


def tokenizer_for(path, config):
    """The tokenizer for a text encoder's config, from a merges file or a tokenizer folder.

    The config decides about padding, not the folder: CLIP (Stable Diffusion 1) pads with the end
    token, and OpenCLIP (2), recognised by its GELU, with id 0.
    """
    with naming(path, "is not a whole, undamaged tokenizer"):
        if Path(path).is_dir():
            merges = load_tokenizer(path).ranks
        else:  # CLIP's bpe_simple_vocab_16e6.txt has more merges than CLIP uses for its 49,408 ids
            merges = read_merges(path)[: min(config.vocab_size, 49408) - 2 * 256 - 2]
        return CLIPTokenizer(merges, config.max_position_embeddings, config.hidden_act != "gelu")


def load_tokenizer(folder):
    """The tokenizer of a folder that save_tokenizer wrote, or of Stable Diffusion's tokenizer/.

    Raises ValueError if the vocabulary does not follow from the merges.
    """
    folder, settings, added = Path(folder), {}, []
    # As in transformers, special_tokens_map.json overrides the other file. In the folders of SD 2,
    # only special_tokens_map.json says that padding is id 0, the token "!".
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings |= read_json(folder / name)
    with naming(folder, "is not a whole, undamaged tokenizer"):
        if (folder / "tokenizer.json").exists() and not (folder / "merges.txt").exists():
            content = read_json(folder / "tokenizer.json")
            model, added = content["model"], [x["content"] for x in content.get("added_tokens", ())]
            # "a b" up to transformers 4.44, ["a", "b"] in later versions
            merges = [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]
            vocabulary = model["vocab"]
        else:
            merges = read_merges(folder / "merges.txt")
            vocabulary = read_json(folder / "vocab.json")
            if (folder / "added_tokens.json").exists():
                added = [*read_json(folder / "added_tokens.json")]
        pad = settings.get("pad_token")
        pad = pad["content"] if isinstance(pad, dict) else pad
        length = index(settings.get("model_max_length", 77))  # refuses fractions
        tokenizer = CLIPTokenizer(merges, length, pad_with_end=pad != "!")
        if differing := vocabulary.items() ^ tokenizer.ids.items():
            raise ValueError(f"vocabulary and merges disagree about {min(differing)[0]!r}")
    if new := sorted(set(added) - tokenizer.ids.keys()):
        raise ValueError(f"{folder}: has the added token {new[0]!r}, as after textual inversion; "
                         "added tokens are not supported")
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


def describe_cuts(tokenizer, texts, name):
    """[a line about the texts that are too long and the words they lose], or [] if all fit."""
    if tokenizer is None:
        return []
    lengths = [len(tokenizer.encode(text)) + 2 for text in texts]  # 2: start and end
    lost = [text for text, length in zip(texts, lengths, strict=True)
            if length > tokenizer.max_length]
    words = ", ".join(f'"{tokenizer.left_out(text):.60}"' for text in lost[:3])
    return lost and [f"{len(lost)} of {len(texts)} {name} have more than {tokenizer.max_length} "
                     f"tokens (up to {max(lengths)}), so the model does not see {words}"]


def read_merges(path):
    """The pairs of a merges file, plain or .gz, whose first line is a comment with #version."""
    data = Path(path).read_bytes()
    text = (gzip.decompress(data) if str(path).endswith(".gz") else data).decode()
    lines = text.rstrip("\n").split("\n")
    return [line.split() for line in lines["#version" in lines[0]:]]
