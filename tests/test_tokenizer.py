"""CLIP's tokenizer: words, merges and ids, against values worked out by hand and CLIP's own.

Recorded with regex 2026.11 and a copy of openai/CLIP's simple_tokenizer.py without its call of
ftfy: token ids of the merges that CAPTIONS teach, and a hash of the words that CLIP's pattern finds
around each character of Unicode 3.2. Newer characters are left out, because the version of Unicode
differs between Pythons.
"""

import hashlib
import unicodedata
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from tokenizer import CLIPTokenizer, merge_pair, split_words, to_symbols

CAPTIONS = [
    f"A {color} {shape} moves {side}."
    for color in ("red", "green") for shape in ("circle", "square") for side in ("left", "right")
]
A, B, C = (ord(letter) - ord("!") for letter in "abc")  # "!" is the first visible byte: id 0
ENDING = 256  # added to the id of a byte that ends a word


# Words


@pytest.mark.parametrize("text, words", [
    (" \t\n\u3000 ", []),
    ("A  Red\nSquare.", ["a", "red", "square", "."]),
    ("it's they'LL '90s", ["it", "'s", "they", "'ll", "'", "9", "0", "s"]),
    ("don't!'s", ["don", "'t", "!'", "s"]),  # a run of signs swallows the apostrophe
    ("2024 ½ⅷ", ["2", "0", "2", "4", "½", "ⅷ"]),  # every digit is a word
    ("&amp;lt;b&gt;", ["<", "b", ">"]),  # unescaped twice
    ("cafe\u0301", ["cafe", "\u0301"]),  # a combining mark is no letter
    ("x\x1cy\x1c", ["x", "\x1c", "y"]),  # no white space inside, yet stripped at the end
    ("a\u0345b", ["a", "b"]),
    ("Straße 赤い丸", ["straße", "赤い丸"]),
    ("a<|EndOfText|>b", ["a", "<|endoftext|>", "b"]),
])
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


@pytest.mark.parametrize("alphabet", ["ab", "abcd", "aé", "a.1"])
def test_the_merges_are_those_of_counting_every_pair_anew(alphabet):
    random, bars, merges = Random(0), [], []
    text = " ".join("".join(random.choices(alphabet, k=random.randint(1, 9))) for _ in range(80))
    words = [(to_symbols(word), count) for word, count in Counter(split_words(text)).items()]
    for _ in range(50):
        pairs = Counter()
        for symbols, count in words:
            for pair in pairwise(symbols):
                pairs[pair] += count
        if pairs:
            merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
            words = [(merge_pair(symbols, merges[-1]), count) for symbols, count in words]
    tokenizer = CLIPTokenizer.train(
        [text], 50, progress=lambda steps: bars.append(steps) or steps)
    assert list(tokenizer.ranks) == merges and bars == [range(50)]


def test_training_stops_when_no_pair_is_left():
    assert CLIPTokenizer.train(["abc"], num_merges=100).vocab_size == 512 + 2 + 2


def test_training_learns_nothing_from_start_and_end():
    assert not CLIPTokenizer.train(["<|startoftext|> <|endoftext|>"], num_merges=9).ranks


def test_every_trained_caption_becomes_one_token_per_word():
    tokenizer = CLIPTokenizer.train(CAPTIONS, num_merges=1000)
    assert len(tokenizer.encode("a green square moves right.")) == 6


def test_bytes_without_merges_keep_clips_order():
    assert CLIPTokenizer([]).encode("a b¡ ") == [A + ENDING, B + ENDING, 126, 94 + ENDING]  # C2 A1


def test_the_merge_learned_first_is_applied_first():
    early_bc = CLIPTokenizer([("b", "c</w>"), ("a", "b")])
    early_ab = CLIPTokenizer([("a", "b"), ("b", "c</w>")])
    assert early_bc.encode("abc") == [A, 512]
    assert early_ab.encode("abc") == [512, C + ENDING]


def test_a_merge_joins_runs_from_the_left():
    assert CLIPTokenizer([("a", "a")]).encode("aaaab") == [512, 512, B + ENDING]


def test_ids_equal_those_of_clips_own_code():
    encode = CLIPTokenizer.train(CAPTIONS, num_merges=60).encode
    assert encode("A red circle moves left.") == [320, 536, 523, 515, 532, 269]
    assert encode("It's 10 green&amp;blue CAFÉS!") == [
        72, 339, 6, 338, 272, 271, 530, 261, 65, 75, 84, 324, 66, 64, 69, 127, 102, 338, 256,
    ]
    assert encode("we'll \U0001f600") == [86, 324, 6, 75, 331, 172, 253, 246, 478]


# Ids of fixed length


@pytest.mark.parametrize("text, options, ids", [
    ("ab", {}, [512, A, B + ENDING, 513, 513, 513]),
    ("ab", {"pad_with_end": False}, [512, A, B + ENDING, 513, 0, 0]),
    ("a!!", {"pad_with_end": False}, [512, A + ENDING, 0, ENDING, 513, 0]),  # "!" is no padding
    ("a b c", {"max_length": 4}, [512, A + ENDING, B + ENDING, 513]),  # the end token is kept
    ("a b", {"max_length": 2}, [512, 513]),
])
def test_ids_are_start_text_end_and_padding(text, options, ids):
    assert CLIPTokenizer([], **{"max_length": 6} | options)([text]).tolist() == [ids]


@pytest.mark.parametrize("new", [CLIPTokenizer([]), CLIPTokenizer.train(["a"], 0)])
def test_by_default_an_empty_text_is_start_and_76_ends(new):
    assert new([""]).tolist() == [[512] + 76 * [513]]


@pytest.mark.parametrize("num_words, length", [(3, 16), (14, 16), (15, 17), (75, 77), (76, 77)])
def test_the_longest_caption_decides_the_length_from_16_to_77(num_words, length):
    captions = ["a", num_words * "a ", "a b"]
    assert CLIPTokenizer.train(captions, 9, max_length=None).max_length == length


@pytest.mark.parametrize("text, lost", [
    ("a b", ""), ("a b c", "c"), ("a bc d", "bc d"), ("a &amp; b", "b")])  # bc: only in part
def test_words_are_left_out_that_do_not_fit_wholly(text, lost):
    assert CLIPTokenizer([], max_length=4).left_out(text) == lost


def test_start_and_end_written_in_a_text_are_single_tokens():
    assert CLIPTokenizer([]).encode("<|StartOfText|><|endoftext|>") == [512, 513]


# Mistakes


def test_one_text_instead_of_a_list_is_refused():
    with pytest.raises(ValueError, match="texts needs a list of str, got the str 'a red square'"):
        CLIPTokenizer([])("a red square")


@pytest.mark.parametrize("merges", [[("a", "xy")], [("xy", "b")], [("a", "b"), ("a", "b")]])
def test_a_merge_of_unknown_symbols_or_to_a_known_one_is_refused(merges):
    with pytest.raises(ValueError, match=f"merges need two known .* as number {len(merges)}$"):
        CLIPTokenizer(merges)
