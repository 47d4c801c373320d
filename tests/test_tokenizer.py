"""CLIP's tokenizer: words, merges and ids, against values worked out by hand and CLIP's own.

Recorded with regex 2026.11 and a copy of openai/CLIP's simple_tokenizer.py without its call of
ftfy: token ids of the merges that `trained()` learns, and a hash of the words that CLIP's pattern
finds around each character of Unicode 3.2. Newer characters are left out, because the version of
Unicode differs between Pythons.
"""

import hashlib
import unicodedata

import pytest

from tokenizer import CLIPTokenizer, split_words

CAPTIONS = [
    f"A {color} {shape} moves {side}."
    for color in ("red", "green")
    for shape in ("circle", "square")
    for side in ("left", "right")
]
A, B, C = (ord(letter) - ord("!") for letter in "abc")  # "!" is the first visible byte: id 0
ENDING = 256  # added to the id of a byte that ends a word


def trained():
    return CLIPTokenizer.train(CAPTIONS, num_merges=60, max_length=12)


# Words


@pytest.mark.parametrize(
    "text, words",
    [
        ("", []),
        (" \t\n\u3000 ", []),
        ("A  Red\nSquare.", ["a", "red", "square", "."]),
        ("it's they'LL '90s", ["it", "'s", "they", "'ll", "'", "9", "0", "s"]),
        ("don't!'s", ["don", "'t", "!'", "s"]),  # a run of signs swallows the apostrophe
        ("2024 ½ⅷ", ["2", "0", "2", "4", "½", "ⅷ"]),  # every digit is a word
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


def test_the_example_of_the_docstring_holds():
    tokenizer = CLIPTokenizer.train(["low low lower"], num_merges=3)
    assert list(tokenizer.ranks) == [("l", "o"), ("lo", "w</w>"), ("e", "r</w>")]
    symbols = [tokenizer.tokens[index] for index in tokenizer.encode("low slower")]
    assert symbols == ["low</w>", "s", "lo", "w", "er</w>"]


def test_training_learns_the_most_frequent_pair_then_the_first_in_code_point_order():
    tokenizer = CLIPTokenizer.train(["zx cd", "zx ab", "ab zx cd"], num_merges=3)
    assert list(tokenizer.ranks) == [("z", "x</w>"), ("a", "b</w>"), ("c", "d</w>")]


def test_training_stops_when_no_pair_is_left():
    assert CLIPTokenizer.train(["abc"], num_merges=100).vocab_size == 512 + 2 + 2


def test_training_learns_nothing_from_start_and_end():
    assert not CLIPTokenizer.train(["<|startoftext|> <|endoftext|>"], num_merges=9).ranks


def test_bytes_without_merges_keep_clips_order():
    assert CLIPTokenizer([]).encode("a b¡ ") == [A + ENDING, B + ENDING, 126, 94 + ENDING]  # C2 A1


def test_the_merge_learned_first_is_applied_first():
    early_bc = CLIPTokenizer([("b", "c</w>"), ("a", "b")])
    early_ab = CLIPTokenizer([("a", "b"), ("b", "c</w>")])
    assert early_bc.encode("abc") == [A, 512]
    assert early_ab.encode("abc") == [512, C + ENDING]


def test_a_merge_joins_runs_from_the_left():
    assert CLIPTokenizer([("a", "a")]).encode("aaaab") == [512, 512, B + ENDING]


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


def test_the_shortest_ids_are_start_and_end():
    assert CLIPTokenizer([], max_length=2)(["a b"]).tolist() == [[512, 513]]


@pytest.mark.parametrize("new", [CLIPTokenizer([]), CLIPTokenizer.train(["a"], 0)])
def test_by_default_an_empty_text_is_start_and_76_ends(new):
    assert new([""]).tolist() == [[512] + 76 * [513]]


def test_start_and_end_written_in_a_text_are_single_tokens():
    assert CLIPTokenizer([]).encode("<|StartOfText|><|endoftext|>") == [512, 513]


def test_an_exclamation_mark_is_no_padding():
    tokenizer = CLIPTokenizer([], max_length=6, pad_with_end=False)
    assert tokenizer(["a!!"]).tolist() == [[512, A + ENDING, 0, ENDING, 513, 0]]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: CLIPTokenizer.train(["a", None], 9), r"captions\[1\] .* NoneType"),
        (lambda: CLIPTokenizer([])("a red square"), "texts needs a list of str, got str"),
        (lambda: CLIPTokenizer([])(["a", 7]), r"texts\[1\] .* int"),
        (lambda: CLIPTokenizer([], max_length=1), "max_length .* got 1"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
