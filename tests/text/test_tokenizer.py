"""CLIP's tokenizer against open_clip's (golden file made by tests/oracles/golden_clip_text.py)."""

import json

import numpy as np

from jaxdg.text import tokenizer


def test_a_thousand_texts_get_open_clips_ids(golden):
    """Phrases with quotes, HTML, broken encodings, control signs, more than 77 tokens, and mixtures
    of 34 ranges of Unicode.
    """
    with np.load(golden / "clip_tokens.npz") as archive:
        texts = json.loads(archive["texts"].tobytes())
        expected = archive["ids"]
    ids = tokenizer.tokenize(texts)
    assert (ids.shape, ids.dtype) == ((1000, 77), np.int32)
    wrong = [
        text
        for text, mine, theirs in zip(texts, ids, expected, strict=True)
        if not np.array_equal(mine, theirs)
    ]
    assert not wrong, wrong
    # Had everything been cut, or nothing been joined, equality would show little.
    lengths = (expected != 0).sum(1)
    assert (lengths == 77).sum() >= 3
    assert len(np.unique(expected)) > 1500
    assert len({text for text in texts if any(ord(sign) > 0x2FFF for sign in text)}) > 200


def test_the_vocabulary_is_clips():
    """49 408 tokens at the ids that OpenAI's vocabulary gives well-known ones; a phrase by hand."""
    ids = tokenizer.token_ids()
    assert len(ids) == tokenizer.VOCABULARY == 49408
    assert sorted(ids.values()) == list(range(49408))
    assert [ids[token] for token in ("!", "!</w>", "a</w>", "photo</w>")] == [0, 256, 320, 1125]
    assert tokenizer.tokenize(["A photo of a\ncat"])[0, :8].tolist() == [
        49406,
        320,
        1125,
        539,
        320,
        2368,
        49407,
        0,
    ]


def test_texts_do_not_depend_on_each_other():
    """A text has the ids it has alone, however it is written in a list, twice, after longer ones;
    no texts give no rows.
    """
    texts = ["road", "a much longer text before " * 9, "road"]
    together = tokenizer.tokenize(texts)
    for row, text in zip(together, texts, strict=True):
        np.testing.assert_array_equal(tokenizer.tokenize([text])[0], row)
    assert tokenizer.tokenize([]).shape == (0, 77)
