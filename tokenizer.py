"""Captions to numbers: CLIP's tokenizer, byte-level byte-pair encoding.

    caption -> words -> symbols -> merged symbols -> ids (b, n)

A word starts as one symbol per byte, so no word is unknown. Training repeatedly joins the most
frequent pair of neighbours. Three merges learned from the caption "low low lower":

    l o w</w>  l o w</w>  l o w e r</w>    (l, o) occurs three times
    lo w</w>   lo w</w>   lo w e r</w>     (lo, w</w>) occurs twice
    low</w>    low</w>    lo w e r</w>     each pair occurs once, and (e, r</w>) sorts first
    low</w>    low</w>    lo w er</w>

Encoding applies the merges in the order of learning, so "slower" becomes 4 tokens: s lo w er</w>.
Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
"""

import html
import re
import unicodedata
from collections import Counter, defaultdict
from itertools import accumulate, pairwise

import torch

START, END = "<|startoftext|>", "<|endoftext|>"
# Suffix of a word's last symbol. It keeps the word "art" (one token, art</w>) apart from the first
# letters of "artist".
WORD_END = "</w>"
# Tokens of a text if captions decide: at most CLIP's; at least 16, as prompts may be longer
SHORTEST, LONGEST = 16, 77

# CLIP splits text with a pattern of the `regex` package:
#   <|startoftext|> | <|endoftext|> | 's|'t|'re|'ve|'m|'ll|'d | \p{L}+ | \p{N} | [^\s\p{L}\p{N}]+
# The standard library has no \p{L} (any letter) and no \p{N} (any number, such as ½). So `re` finds
# the fixed words, and split_words() scans for the rest.
FIXED_WORDS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)


def byte_alphabet():
    """One visible character per byte, {byte: character}, in CLIP's order."""
    # Bytes that print in Latin-1 stand for themselves and come first. The others (controls, spaces,
    # the soft hyphen) get U+0100 and up, because a merges file separates symbols by spaces.
    visible = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = [*visible, *range(256, 256 + len(hidden))]
    return dict(zip(visible + hidden, map(chr, characters), strict=True))


BYTE_TO_CHARACTER = byte_alphabet()


def split_words(text):
    """The words of a text in lower case: "It's 10!" -> it 's 1 0 !"""
    # Unescape twice, because captions from the web contain "&amp;lt;". openai/CLIP also repairs
    # wrongly decoded text with ftfy here, which would be one more package.
    text = html.unescape(html.unescape(text)).strip().lower()
    words, start = [], 0
    while start < len(text):
        kind, end = character_kind(text[start]), start + 1
        if fixed := FIXED_WORDS.match(text, start):
            end = fixed.end()
        elif kind != "N":  # every digit is its own word, so numbers share ten tokens
            while end < len(text) and character_kind(text[end]) == kind:
                end += 1
        if kind != " ":
            words.append(text[start:end])
        start = end
    return words


def character_kind(character):
    """ "L" for a letter, "N" for a number, " " for a separator, "" for any other character."""
    # Not all of isspace(), because CLIP keeps U+001C to U+001F. It drops U+0345, because this mark
    # equals a letter when case is ignored, so no part of CLIP's pattern matches it.
    if character == "\u0345" or (character.isspace() and character not in "\x1c\x1d\x1e\x1f"):
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else ""


def to_symbols(word):
    """A word as a list of symbols, one per byte of its UTF-8 form."""
    symbols = [BYTE_TO_CHARACTER[byte] for byte in word.encode("utf-8")]
    return symbols[:-1] + [symbols[-1] + WORD_END]


def merge_pair(symbols, pair):
    """The symbols with every occurrence of the pair joined, from left to right."""
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


class CLIPTokenizer:
    """Texts to max_length ids each, start, end and padding included.

    merges: pairs of symbols in the order in which they were learned.
    pad_with_end: pad with the end token (SD 1) or with id 0 (SD 2).
    """

    def __init__(self, merges, max_length=77, pad_with_end=True):
        # CLIP's ids: 256 bytes inside a word, 256 that end a word, one per merge, start, end.
        characters = list(BYTE_TO_CHARACTER.values())
        self.ids = {token: index for index, token in enumerate(characters)}
        self.ids |= {token + WORD_END: 256 + index for index, token in enumerate(characters)}
        self.ranks = {}  # pair -> position in the order of learning
        for left, right in merges:
            if left not in self.ids or right not in self.ids or left + right in self.ids:
                raise ValueError(f"merges need two known symbols that make a new one, got {left!r} "
                                 f"{right!r} as number {len(self.ranks) + 1}")
            self.ranks[left, right] = len(self.ranks)
            self.ids[left + right] = len(self.ids)
        self.start_id = self.ids[START] = len(self.ids)
        self.end_id = self.ids[END] = len(self.ids)
        self.tokens = list(self.ids)
        self.vocab_size = len(self.tokens)
        self.max_length = max_length
        # Id 0 is also "!" inside a word, so only its position shows that a token is padding.
        self.pad_id = self.end_id if pad_with_end else 0
        # As in CLIP, a start or end that is written out in a caption is that one token.
        self.cache = {START: [self.start_id], END: [self.end_id]}

    @classmethod
    def train(cls, captions, num_merges, max_length=77, pad_with_end=True, progress=iter):
        """Learn num_merges merges from a list of captions; fewer if no pair is left.

        max_length None: the longest caption decides. `progress` may draw a bar over a range.
        """
        frequency = Counter(word for caption in captions for word in split_words(caption))
        words = {word: to_symbols(word) for word in frequency if word not in (START, END)}
        # pair -> its frequency, pair -> words that have or had it
        pairs, words_with, merges = Counter(), defaultdict(set), []

        def count(word, sign):
            for pair in pairwise(words[word]):
                pairs[pair] += sign * frequency[word]
                words_with[pair].add(word)

        for word in words:
            count(word, 1)
        for _ in progress(range(num_merges)):
            if not (most := max(pairs.values(), default=0)):
                break
            # The most frequent pair. Ties go to the first in code point order, so that the order of
            # the captions does not matter.
            merges.append(min(pair for pair in pairs if pairs[pair] == most))
            for word in words_with.pop(merges[-1]):  # a merge changes the pairs of few words
                count(word, -1)
                words[word] = merge_pair(words[word], merges[-1])
                count(word, 1)
        tokenizer = cls(merges, max_length or LONGEST, pad_with_end)
        if max_length is None:
            longest = max((len(tokenizer.encode(caption)) for caption in captions), default=0)
            tokenizer.max_length = min(max(longest + 2, SHORTEST), LONGEST)  # 2: start and end
        return tokenizer

    def encode(self, text):
        """The ids of one text, a list without start, end and padding."""
        return [index for word in split_words(text) for index in self._encode_word(word)]

    def _encode_word(self, word):
        if word not in self.cache:  # words repeat, so each is merged only once
            symbols = to_symbols(word)
            while known := [pair for pair in pairwise(symbols) if pair in self.ranks]:
                symbols = merge_pair(symbols, min(known, key=self.ranks.get))  # learned first
            self.cache[word] = [self.ids[symbol] for symbol in symbols]
        return self.cache[word]

    def left_out(self, text):
        """The words of a text that do not fit into max_length tokens, or only in part."""
        words = split_words(text)
        ends = accumulate(len(self._encode_word(word)) for word in words)
        return " ".join(word for word, end in zip(words, ends, strict=True)
                        if end > self.max_length - 2)

    def __call__(self, texts):
        """A list of texts to ids (len(texts), max_length), int64: start, text, end, padding."""
        if isinstance(texts, str):
            raise ValueError(f"texts needs a list of str, got the str {texts!r:.60}")
        ids = torch.full((len(texts), self.max_length), self.pad_id)  # b n, all padding
        for row, text in zip(ids, texts, strict=True):
            # A long text loses its last tokens but not the end token, which the networks expect.
            kept = self.encode(text)[: self.max_length - 2]
            row[: len(kept) + 2] = torch.tensor([self.start_id, *kept, self.end_id])
        return ids
