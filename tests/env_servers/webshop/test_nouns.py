"""Nouns of titles: the tokenizer's rules and the choice of the tagger. The recorded ones: see
`test_webshop_transcripts_process`.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from env_servers.environment import BrokenTask
from env_servers.webshop.nouns import open_tagger, word_nouns
from env_servers.webshop.tokens import tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Women's T-Shirt, 3-Pack", ["Women", "'s", "T", "-", "Shirt", ",", "3", "-", "Pack"]),
        ('S/M/L (28" x 30")', ["S", "/", "M", "/", "L", "(", "28", '"', "x", "30", '"', ")"]),
        ("10in 6pcs 20cm", ["10", "in", "6pcs", "20", "cm"]),
        ("shirt.White 3.Pack ABC.DEF", ["shirt", ".", "White", "3.Pack", "ABC.DEF"]),
        ("foo.com http://foo.com/x", ["foo.com", "http://foo.com/x"]),
        ("Acme Co. No. 7", ["Acme", "Co.", "No", ".", "7"]),
        ("Im dont can't won’t its Lets", ["I", "m", "do", "nt", "ca", "n't", "wo", "n’t", "its", "Lets"]),
        ("cup™Tea®", ["cup", "™", "Tea", "®"]),
        ("Size:D Size:Large", ["Size", ":D", "Size", ":", "Large"]),
        ("US$5 $USB 8am", ["US$", "5", "$", "USB", "8", "am"]),
        ("100%Cotton w/o and/or w/Case", ["100%Cotton", "w/o", "and/or", "w", "/", "Case"]),
        ("", []),
    ],
)
def test_tokens_are_spacys(text: str, tokens: list[str]) -> None:
    """Expected tokens are what spaCy 3.8.18's blank English pipeline returns."""
    assert tokenize(text) == tokens


def test_nouns_are_words_that_are_no_stop_words() -> None:
    assert word_nouns("The Lamp with a LAMP, 3 in 1 and more Lights2") == ["lamp", "lamp"]


def test_without_spacy_the_stop_words_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert open_tagger("auto").name == "stop words"
    with pytest.raises(BrokenTask, match="cannot load spaCy's en_core_web_sm"):
        open_tagger("spacy")


class _Pipeline:
    """What the tagger uses of a spaCy pipeline: capitalised words are its nouns."""

    meta: ClassVar[dict[str, str]] = {"version": "3.8.0"}

    def __call__(self, text: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(text=word, pos_="PROPN" if word[0].isupper() else "VERB") for word in text.split()]


def test_spacys_model_is_asked_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    spacy = ModuleType("spacy")
    spacy.load = lambda name, exclude: _Pipeline()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    assert open_tagger("stop-words").name == "stop words"
    tagger = open_tagger("auto")
    assert tagger.name == "spaCy en_core_web_sm 3.8.0"
    assert tagger.nouns("Lamp stands The Table") == ["lamp", "the", "table"]
