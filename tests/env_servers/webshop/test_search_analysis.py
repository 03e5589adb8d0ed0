"""Terms as Lucene's English analyzer makes them."""

from __future__ import annotations

import pytest

from env_servers.webshop.search.analysis import STOP_WORDS, analyze


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", ""),
        ("This is not the one that they will be at", "on"),
        ("men's Men\u2019S boys' it's s", "men men boi s"),
        ("caresses ponies cats feed agreed plastered motoring", "caress poni cat feed agre plaster motor"),
        ("hopping falling hissing failing filing happy sky", "hop fall hiss fail file happi sky"),
        ("relational valenci digitizer operator formaliti", "relat valenc digit oper formal"),
        ("triplicate electrical hopefulness replacement adoption", "triplic electr hope replac adopt"),
        ("possibly archaeology us as gas", "possibl archaeolog us ga"),
        ("4.5oz 2021 B07XYZ", "4.5oz 2021 b07xyz"),
    ],
)
def test_analyze(text: str, terms: str) -> None:
    assert " ".join(analyze(text)) == terms


def test_stop_words_alone_are_nothing() -> None:
    assert len(STOP_WORDS) == 33
    assert analyze(" ".join(sorted(STOP_WORDS))) == []
    assert analyze(" ".join(sorted(STOP_WORDS)).upper()) == []
