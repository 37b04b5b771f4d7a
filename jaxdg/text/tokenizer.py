"""CLIP's byte-pair tokenizer (Radford et al. 2021): texts to 77 token ids.

The ids equal those of OpenAI, open_clip and EVA-CLIP. ftfy repairs a text; HTML entities are
replaced, letters are lower-cased, and the text is split into words. The UTF-8 bytes of a word are
joined pair by pair in the order of learned merges. `clip_merges.txt.gz` beside this file holds the
merges: the 48 894 lines that CLIP uses of `bpe_simple_vocab_16e6.txt.gz` in openai/CLIP (MIT
licence, Copyright (c) 2021 OpenAI). Like open_clip, this cuts texts that are too long, where
OpenAI's code raises, and names the two special tokens `<start_of_text>` and `<end_of_text>`.
"""

from collections.abc import Sequence
import functools
import gzip
import html
import importlib.resources
import itertools
from typing import Any

from jaxtyping import Int32
import numpy as np

LENGTH = 77  # tokens of a text, with start, end and padding
VOCABULARY = 49408
START = "<start_of_text>"
END = "<end_of_text>"
WORD = rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"


def tokenize(texts: Sequence[str]) -> Int32[np.ndarray, "n 77"]:
    """Token ids of texts.

    Args:
        texts: any Unicode.

    Returns:
        A row for each text: start token, tokens of the text, end token, zeros. A text that is too
        long is cut before the end token.
    """
    ids = token_ids()
    rows = np.zeros((len(texts), LENGTH), np.int32)
    for row, text in zip(rows, texts, strict=True):
        tokens = [token for word in words(text) for token in word_tokens(word)][: LENGTH - 2]
        row[: len(tokens) + 2] = [ids[START], *tokens, ids[END]]
    return rows


def words(text: str) -> list[str]:
    """Cleans and lower-cases a text; splits it into words, digits and runs of other signs."""
    import ftfy

    cleaned = html.unescape(html.unescape(ftfy.fix_text(text)))
    return pattern().findall(" ".join(cleaned.split()).lower())


@functools.cache
def pattern() -> Any:
    """The pattern of a word; `re` lacks the classes of letters and numbers of all scripts."""
    import regex

    return regex.compile(WORD, regex.IGNORECASE)


@functools.lru_cache(maxsize=65536)
def word_tokens(word: str) -> tuple[int, ...]:
    """Token ids of one word."""
    ids = token_ids()
    order = merge_order()
    if word in (START, END):
        return (ids[word],)
    *parts, last = (byte_signs()[byte] for byte in word.encode())
    parts.append(last + "</w>")
    while len(parts) > 1:
        first = min(itertools.pairwise(parts), key=lambda pair: order.get(pair, len(order)))
        if first not in order:
            break
        joined = []
        i = 0
        while i < len(parts):  # joins every occurrence of the pair, from the left
            if tuple(parts[i : i + 2]) == first:
                joined.append("".join(first))
                i += 2
            else:
                joined.append(parts[i])
                i += 1
        parts = joined
    return tuple(ids[part] for part in parts)


@functools.cache
def byte_signs() -> tuple[str, ...]:
    """The printable sign for each byte: its Latin-1 sign if printable, else one from 256 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@functools.cache
def merge_order() -> dict[tuple[str, str], int]:
    """The rank of each pair of parts; lower ranks are joined first."""
    packed = importlib.resources.files("jaxdg.text").joinpath("clip_merges.txt.gz").read_bytes()
    pairs = (line.split() for line in gzip.decompress(packed).decode().splitlines())
    return {(left, right): i for i, (left, right) in enumerate(pairs)}


@functools.cache
def token_ids() -> dict[str, int]:
    """The id of every token: bytes, bytes that end a word, joined parts, the special tokens."""
    signs = sorted(byte_signs())  # bytes that stand for themselves come first
    tokens = [*signs, *(sign + "</w>" for sign in signs), *map("".join, merge_order()), START, END]
    return {token: i for i, token in enumerate(tokens)}
