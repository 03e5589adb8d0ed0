"""Words where Lucene's StandardTokenizer finds them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from env_servers.webshop.search.words import LONGEST, words

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
RAINBOW = "\U0001f3f3\ufe0f\u200d\U0001f308"
SCOTLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
US, GB = "\U0001f1fa\U0001f1f8", "\U0001f1ec\U0001f1e7"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        (" \n\t.,:;'-_ ~ ___ ", []),
        ("a 2-pack of wi-fi/usb", ["a", "2", "pack", "of", "wi", "fi", "usb"]),
        ("don't o'neill's 'quoted'", ["don't", "o'neill's", "quoted"]),
        ("u.s.a. size:small note: 3:2", ["u.s.a", "size:small", "note", "3", "2"]),
        ("1,000.50 4.5oz 1;2 7' 9'11 a,b", ["1,000.50", "4.5oz", "1;2", "7", "9'11", "a", "b"]),
        ("a.1 1.a x1.2y b1:c", ["a", "1", "1", "a", "x1.2y", "b1", "c"]),
        ("__a_b__ _1_ a_.b", ["__a_b__", "_1_", "a_", "b"]),
        ("one\xa0two one\u200btwo one\u2011two", ["one", "two", "one", "two", "one", "two"]),
        ("it\u2019s soft\xadware caf\u00e9 cafe\u0301 joggers\u00b7note a\uff1ab", None),
        ("\u00bd \u2460 \u00d7 \u00b0 \u3010red\u3011", ["red"]),
        ("\u5c0f\u7c73 \u3072\u3089", ["\u5c0f", "\u7c73", "\u3072", "\u3089"]),
        ("\u30e9\u30fc\u30e1\u30f3 \ud574\ubb3c\ub77c\uba74", None),
        ("\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22", None),
        ("\u05e6\u05d4\"\u05dc \u05d3'", None),
        ("\u2605\u2605 \u2661 5\u2605", ["\u2605", "\u2605", "\u2661", "5", "\u2605"]),
        ("\u2122 brand\u00ae", ["\u2122", "brand", "\u00ae"]),
        ("\u2764\ufe0f\u2764", ["\u2764\ufe0f", "\u2764"]),
        ("\U0001f44d\U0001f3fdok", ["\U0001f44d\U0001f3fd", "ok"]),
        (FAMILY + "\U0001f525", [FAMILY, "\U0001f525"]),
        (RAINBOW + SCOTLAND + US + GB, [RAINBOW, SCOTLAND, US, GB]),
        ("1\ufe0f\u20e3 #\u20e3", ["1\ufe0f\u20e3", "#\u20e3"]),
        ("_\u0301a \u00e9_\u0301_b __\u0301-\u00e9", ["_\u0301a", "\u00e9_\u0301_b", "\u00e9"]),
        ("\u2764\u200d\u200d\u2764 \u200d\u200d\u2764", None),
        ("\ud83d lone", ["lone"]),
    ],
)
def test_words(text: str, found: list[str] | None) -> None:
    """Without an expectation, blanks alone part the words."""
    assert words(text) == (text.split() if found is None else found)


def test_what_is_too_long_is_cut() -> None:
    assert [len(word) for word in words("ab " + "x" * (2 * LONGEST + 1) + " " + "1.5" * LONGEST)] == [
        2,
        LONGEST,
        LONGEST,
        1,
        LONGEST,
        LONGEST,
        LONGEST,
    ]


@pytest.mark.parametrize("run", ["_", "_\u0301", "\u200d", "#\u0301", "\u0301", "!"])
def test_a_long_run_of_no_words_is_read_once(run: str) -> None:
    """A pattern that tried it again from every place would take minutes here."""
    assert words(run * 50_000 + " \u00e9") == ["\u00e9"]


@given(st.text(st.sampled_from("ab19_.:,;'- \n(")))
def test_plain_and_other_text_are_split_alike(text: str) -> None:
    assert [word.replace("\u00e1", "a") for word in words(text.replace("a", "\u00e1"))] == words(text)


@given(st.text())
def test_words_are_parts_of_the_text_in_order(text: str) -> None:
    at = 0
    for word in words(text):
        at = text.index(word, at) + len(word)


@given(st.text(), st.text())
def test_a_blank_parts_words(first: str, second: str) -> None:
    assert words(f"{first} {second}") == words(first) + words(second)
