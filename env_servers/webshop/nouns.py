"""Tags the nouns of product titles, which the reward compares.

The original asks spaCy's `en_core_web_sm`. Where that is installed it is asked here too; otherwise every word of
letters that is no stop word counts as a noun.
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
    """`nouns` gives the lower-cased nouns of a title, repeats kept; `name` says by which means."""

    name: str
    nouns: Nouns


def open_tagger(wanted: TaggerName) -> Tagger:
    """The tagger that was asked for; `auto`: spaCy's model where it can be loaded, else the stop words.

    Raises:
        BrokenTask: spaCy was asked for and it or its model is missing.
    """
    tagger = Tagger("stop words", word_nouns)
    if wanted != "stop-words":
        try:
            tagger = _spacy_tagger()
        except (ImportError, OSError) as error:
            if wanted == "spacy":
                reason = str(error).splitlines()[0]
                raise BrokenTask(
                    f"spaCy's {MODEL} cannot be loaded ({reason}): install it, or use stop-words"
                ) from None
    logger.info("nouns of titles are tagged by %s", tagger.name)
    return Tagger(tagger.name, functools.lru_cache(CACHED_TITLES)(tagger.nouns))


def word_nouns(title: str) -> list[str]:
    """The words of a title that are made of letters and no stop words."""
    return [word for token in tokenize(title) if token.isalpha() and (word := token.lower()) not in STOP_WORDS]


def _spacy_tagger() -> Tagger:
    pipeline = importlib.import_module("spacy").load(MODEL, exclude=["parser", "ner", "lemmatizer"])

    def nouns(title: str) -> list[str]:
        return [token.text.lower() for token in pipeline(title) if token.pos_ in NOUNS]

    return Tagger(f"spaCy {MODEL} {pipeline.meta.get('version', '')}".strip(), nouns)
