"""Captions to numbers: CLIP's tokenizer, byte-level byte-pair encoding.

    caption -> clean -> words -> byte-pair symbols -> ids (b, n)

A word is written in an alphabet of 256 bytes, so every text can be encoded. Its last symbol is
marked with "</w>", which keeps "art" in "art</w>" apart from "art" in "artist". Then neighbours are
merged, always the pair that was learned first, until no learned pair is left. With the merges
(l, o), (lo, w</w>) and (lo, w) in this order:

    low       l o w</w>        ->  lo w</w>        ->  low</w>
    lowest    l o w e s t</w>  ->  lo w e s t</w>  ->  low e s t</w>

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units". CLIP's merges
and those learned from a handful of captions have the same form (checkpoints/tokenizers.py).

One difference from openai/CLIP: it first repairs wrongly decoded text with ftfy, which would be one
more package. All else is equal, on all characters that this Python's Unicode knows.
"""

import html
import re
import unicodedata
from collections import Counter

import torch

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"

# CLIP splits text with a pattern of the `regex` package:
#   <|startoftext|> | <|endoftext|> | 's|'t|'re|'ve|'m|'ll|'d | \p{L}+ | \p{N} | [^\s\p{L}\p{N}]+
# The standard library has no \p{L} (any letter) and \p{N} (any number, such as the half sign), so
# `re` finds the fixed words here and split_words() scans for the rest.
FIXED_WORDS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)
# Unicode's White_Space; str.isspace() would add U+001C to U+001F, which CLIP keeps inside a text.
# And one combining mark, U+0345: with case ignored it equals the letter iota, so that `regex` finds
# it neither in [\p{L}] nor in [^\s\p{L}\p{N}], and CLIP drops it.
SEPARATORS = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\u0345"
)


def byte_alphabet():
    """One visible character per byte, in CLIP's order: {byte: character}.

    Bytes that print in Latin-1 stand for themselves and come first; the others (controls, spaces,
    the soft hyphen) borrow the characters from U+0100 on, so that a merges file can be read as
    lines of two words.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    visible += range(ord("®"), ord("ÿ") + 1)
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + index) for index, byte in enumerate(hidden)
    }


BYTE_TO_CHARACTER = byte_alphabet()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def split_words(text):
    """The list of words of a caption: lower case, HTML entities resolved, split as CLIP splits.

    A word is a contraction's tail ('s), a run of letters, one digit, or a run of other signs.
    """
    # Twice, because captions from the web hold "&amp;lt;". CLIP also collapses white space here,
    # which changes nothing: the split removes all of it.
    text = html.unescape(html.unescape(text)).strip().lower()
    words, start = [], 0
    while start < len(text):
        kind, end = character_kind(text[start]), start + 1
        if fixed := FIXED_WORDS.match(text, start):
            end = fixed.end()
        elif kind != "N":  # a digit stays alone
            while end < len(text) and character_kind(text[end]) == kind:
                end += 1
        if kind != " ":
            words.append(text[start:end])
        start = end
    return words


def character_kind(character):
    """ "L" for a letter, "N" for a number, " " for a separator, "" for any other sign."""
    if character in SEPARATORS:
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else ""


def to_symbols(word):
    """A word as a list of symbols, one per byte of its UTF-8 form, the last one marked."""
    symbols = [BYTE_TO_CHARACTER[byte] for byte in word.encode("utf-8")]
    return symbols[:-1] + [symbols[-1] + WORD_END]


def merge_pair(symbols, pair):
    """The symbols with every occurrence of the pair joined, from left to right."""
    merged, index = [], 0
    while index < len(symbols):
        width = 2 if tuple(symbols[index : index + 2]) == pair else 1
        merged.append("".join(symbols[index : index + width]))
        index += width
    return merged


class CLIPTokenizer:
    """Texts to ids. The vocabulary: 256 bytes, 256 bytes that end a word, merges, start, end.

    merges: pairs of symbols in the order in which they were learned.
    max_length: tokens per text, with start and end.
    pad_with_end: fill up with the end token (SD 1) or with id 0 (SD 2), which is also the id of
        "!" inside a word; so padding is known by its place and never by its text.
    """

    def __init__(self, merges, max_length=77, pad_with_end=True):
        if not (isinstance(max_length, int) and 2 <= max_length <= 65536):
            raise ValueError(f"max_length needs to be 2 (start, end) to 65536, got {max_length!r}")
        characters = list(BYTE_TO_CHARACTER.values())
        self.ids = {token: index for index, token in enumerate(characters)}
        self.ids |= {token + WORD_END: 256 + index for index, token in enumerate(characters)}
        self.ranks = {}
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
        self.pad_id = self.end_id if pad_with_end else 0
        # As in CLIP, a start or end that is written out in a caption is that one token.
        self.cache = {START: [self.start_id], END: [self.end_id]}

    @classmethod
    def train(cls, captions, num_merges, max_length=77, pad_with_end=True):
        """Learn at most num_merges merges from a list of captions; fewer if no pair is left.

        Each step merges the most frequent pair of neighbours; of equally frequent pairs the first
        in code point order, so that equal captions give equal files. A step costs as much as
        there are different words.
        """
        check_texts(captions, "captions")
        if not captions:
            raise ValueError("captions is empty: there is nothing to learn merges from")
        counts = Counter()
        for caption, count in Counter(captions).items():
            for word in split_words(caption):
                counts[word] += count
        words = [(to_symbols(word), counts[word]) for word in counts if word not in (START, END)]
        merges = []
        while len(merges) < num_merges:
            pairs = Counter()
            for symbols, count in words:
                for pair in zip(symbols, symbols[1:], strict=False):
                    pairs[pair] += count  # how often, not in how many words
            if not pairs:
                break
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # the most frequent
            merges.append(best)
            words = [(merge_pair(symbols, best), count) for symbols, count in words]
        return cls(merges, max_length, pad_with_end)

    def encode(self, text):
        """The ids of one text, without start, end and padding."""
        ids = []  # words repeat, so each is merged once and kept
        for word in split_words(text):
            if word not in self.cache:
                self.cache[word] = self._encode_word(word)
            ids += self.cache[word]
        return ids

    def _encode_word(self, word):
        symbols, last = to_symbols(word), len(self.ranks)  # unknown pairs rank last
        while pairs := list(zip(symbols, symbols[1:], strict=False)):
            best = min(pairs, key=lambda pair: self.ranks.get(pair, last))
            if best not in self.ranks:
                break
            symbols = merge_pair(symbols, best)
        return [self.ids[symbol] for symbol in symbols]

    def __call__(self, texts):
        """A list of texts to ids (len(texts), max_length), int64: start, text, end, padding.

        A text that is too long loses its tail, never the end token.
        """
        check_texts(texts, "texts")
        ids = torch.full((len(texts), self.max_length), self.pad_id)  # b n, all padding
        for row, text in zip(ids, texts, strict=True):
            kept = self.encode(text)[: self.max_length - 2]  # leaves room for start and end
            row[: len(kept) + 2] = torch.tensor([self.start_id, *kept, self.end_id])
        return ids

    def decode(self, ids):
        """The text of a list or tensor (n,) of ids, up to the end token and without the start."""
        text = ""
        for index in map(int, ids):
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"ids need to be in 0..{self.vocab_size - 1}, got {index}")
            if index == self.end_id:
                break
            text += self.tokens[index] if index != self.start_id else ""
        # WORD_END is ASCII, which stands for itself; half a character at a cut end becomes U+FFFD.
        data = bytes(CHARACTER_TO_BYTE[character] for character in text)
        return data.decode("utf-8", errors="replace").replace(WORD_END, " ").strip()


def check_texts(texts, name):
    """Raise ValueError unless texts is a list (or tuple) of str."""
    if not isinstance(texts, list | tuple):
        raise ValueError(f"{name} needs a list of str, got {type(texts).__name__}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}] needs to be a str, got {type(text).__name__}")
