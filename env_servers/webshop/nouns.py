"""Finds the nouns of product titles, which the reward compares.

The original uses spaCy's `en_core_web_sm`. It is used here too if it is installed; otherwise every alphabetic word that
is not a stop word counts as a noun.
"""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Literal

from env_servers.environment import BrokenTask
from env_servers.webshop.english import STOP_WORDS
from env_servers.webshop.reward import Nouns
from env_servers.webshop.tokens import tokenize

logger = logging.getLogger(__name__)

TaggerName = Literal["auto", "spacy", "stop-words"]

MODEL = "en_core_web_sm"
NOUNS = frozenset({"NOUN", "PROPN"})
CACHED_TITLES = 4096


@dataclass(frozen=True, slots=True)
class Tagger:
    """Finds nouns.

    Attributes:
        name: the method, such as `stop words`.
        nouns: title → its nouns, lower-cased, with repetitions.
    """

    name: str
    nouns: Nouns


def open_tagger(wanted: TaggerName) -> Tagger:
    """Return the requested tagger. `auto` is spaCy's model if it can be loaded, otherwise the stop words.

    Raises:
        BrokenTask: spaCy was requested, and it or its model is missing.
    """
    tagger = Tagger("stop words", word_nouns)
    if wanted != "stop-words":
        try:
            tagger = _spacy_tagger()
        except (ImportError, OSError) as error:
            if wanted == "spacy":
                reason = str(error).splitlines()[0]
                raise BrokenTask(f"cannot load spaCy's {MODEL} ({reason}): install it, or use stop-words") from None
    logger.info("noun tagger: %s", tagger.name)
    return Tagger(tagger.name, functools.lru_cache(CACHED_TITLES)(tagger.nouns))


def word_nouns(title: str) -> list[str]:
    """Return the alphabetic words of a title, lower-cased, without stop words."""
    return [word for token in tokenize(title) if token.isalpha() and (word := token.lower()) not in STOP_WORDS]


def _spacy_tagger() -> Tagger:
    pipeline = importlib.import_module("spacy").load(MODEL, exclude=["parser", "ner", "lemmatizer"])

    def nouns(title: str) -> list[str]:
        return [token.text.lower() for token in pipeline(title) if token.pos_ in NOUNS]

    return Tagger(f"spaCy {MODEL} {pipeline.meta.get('version', '')}".strip(), nouns)
