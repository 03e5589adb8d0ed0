"""Turns text into index terms: Lucene's English analysis.

Steps: split into words, remove a possessive 's, lower-case, remove stop words, stem (Porter with his own extensions).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from env_servers.webshop.search.words import words

_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
_POSSESSIVE = ("'s", "'S", "\u2019s", "\u2019S", "\uff07s", "\uff07S")
_CACHED_TERMS = 1 << 16


def analyze(text: str) -> list[str]:
    """Return the terms of a text, in order, with repetitions.

    Example:
        analyze("The dog's running shoes")  # ["dog", "run", "shoe"]
    """
    return [found for found in map(term, words(text)) if found]


@functools.lru_cache(maxsize=_CACHED_TERMS)
def term(word: str) -> str:
    """Return the term of a word; the empty string for a stop word."""
    if word.endswith(_POSSESSIVE):
        word = word[:-2]
    word = word.lower()
    return "" if word in STOP_WORDS else _stemmer()(word)


@functools.cache
def _stemmer() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer  # imported here because it takes most of a second

    stemmer = PorterStemmer(PorterStemmer.MARTIN_EXTENSIONS)
    return functools.partial(stemmer.stem, to_lowercase=False)
