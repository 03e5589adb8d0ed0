"""Splits English text into words and punctuation, by the rules of spaCy's English tokenizer (explosion/spaCy, MIT).

Only alphabetic words of titles in Latin script have to agree with spaCy: other tokens are never nouns. The units of
other scripts are therefore left out.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from env_servers.webshop.english import EMOTICONS, EXCEPTIONS

_PUNCTUATION = r"……|…|,|:|;|\!|\?|¿|؟|¡|\(|\)|\[|\]|\{|\}|<|>|_|#|\*|&|。|？|！|，|、|；|：|～|·|।|،|۔|؛|٪"
_QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉⟦⟧"
_CURRENCY = r"\$|£|€|¥|฿|US\$|C\$|A\$|[₠-₿]|﷼"
_UNITS = (
    "km²|km³|km|m²|m³|m|dm²|dm³|dm|cm²|cm³|cm|mm²|mm³|mm|ha|µm|nm|yd|in|ft|kg|g|mg|µg|t|lb|oz|m/s|km/h|kmh|mph|hPa|Pa|"
    "mbar|mb|MB|kb|KB|gb|GB|tb|TB|T|G|M|K|%"
)
_HYPHENS = "---|--|——|-|–|—|~"
_HOST = r"(?:(?:[A-Za-z0-9\u00a1-\uffff][A-Za-z0-9\u00a1-\uffff_-]{0,62})?[A-Za-z0-9\u00a1-\uffff]\.)+"
_ADDRESS = (
    r"(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])(?:\.(?:1?\d{1,2}|2[0-4]\d|25[0-5])){2}\.(?:[1-9]\d?|1\d\d|2[0-4]\d|25[0-4])"
)


@dataclass(frozen=True, slots=True)
class _Rules:
    """Compiled patterns.

    Attributes:
        prefix: what is split off the front of a text.
        suffix: what is split off its end.
        infixes: what splits it inside.
        address: a web address, which is not split.
    """

    prefix: Callable[[str], re.Match[str] | None]
    suffix: Callable[[str], re.Match[str] | None]
    infixes: Callable[[str], Iterator[re.Match[str]]]
    address: Callable[[str], re.Match[str] | None]


def tokenize(text: str) -> list[str]:
    """Return the tokens of a text, without white space.

    Example:
        tokenize("Women's (2-pack) shoes 10in")  # ["Women", "'s", "(", "2", "-", "pack", ")", "shoes", "10", "in"]
    """
    return [token for part in text.split() for token in _merge_emoticons(_tokenize_part(part))]


def _tokenize_part(part: str) -> list[str]:
    rules = _rules()
    front: list[str] = []
    back: list[str] = []
    while part and part not in EXCEPTIONS:
        prefix = rules.prefix(part)
        if prefix is not None:
            front.append(prefix[0])
            part = part[prefix.end() :]
            if part in EXCEPTIONS:
                break
        suffix = rules.suffix(part)
        if suffix is not None:
            back.append(suffix[0])
            part = part[: suffix.start()]
        if prefix is None and suffix is None:
            break
    return [*front, *_split_inside(part, rules), *reversed(back)]


def _split_inside(part: str, rules: _Rules) -> Iterable[str]:
    if part in EXCEPTIONS:
        return EXCEPTIONS[part]
    if rules.address(part):
        return (part,)
    pieces: list[str] = []
    done = 0
    for infix in rules.infixes(part):
        if infix.start() == 0:
            continue
        pieces += [part[done : infix.start()], infix[0]]
        done = infix.end()
    return [piece for piece in (*pieces, part[done:]) if piece]


def _merge_emoticons(tokens: list[str]) -> list[str]:
    merged: list[str] = []
    start = 0
    while start < len(tokens):
        for end in range(min(len(tokens), start + 3), start, -1):
            whole = "".join(tokens[start:end])
            if end == start + 1 or whole in EMOTICONS:
                merged.append(whole)
                start = end
                break
    return merged


@functools.cache
def _rules() -> _Rules:
    letters = [
        chr(code) for code in (*range(0x41, 0x5B), *range(0x61, 0x7B), *range(0xC0, 0x2000), *range(0x3040, 0xD7B0))
    ]
    letters = [letter for letter in letters if letter.isalpha()]
    alpha = _class(letters)
    lower = _class(letter for letter in letters if not letter.isupper())
    upper = _class(letter for letter in letters if not letter.islower())
    symbols = (chr(code) for code in (*range(0xA6, 0x3400), *range(0x1F000, 0x1FB00)))
    icons = f"[{_class(symbol for symbol in symbols if unicodedata.category(symbol) == 'So')}]"
    quotes = re.escape(_QUOTES)
    common = rf"{_PUNCTUATION}|\.\.+|[{quotes}]|{icons}"
    stops = rf"0-9{lower}%²\-\+{_PUNCTUATION}(?:{quotes})"
    return _Rules(
        prefix=re.compile(rf"§|%|=|—|–|\+(?![0-9])|{common}|{_CURRENCY}").match,
        suffix=re.compile(
            rf"(?:{common}|'s|'S|’s|’S|—|–|(?<=[0-9])\+|(?<=°[FfCcKk])\.|(?<=[0-9])(?:{_CURRENCY}|{_UNITS})"
            rf"|(?<=[{stops}])\.|(?<=[{upper}][{upper}])\.)$"
        ).search,
        infixes=re.compile(
            rf"\.\.+|…|{icons}|(?<=[0-9])[+\-\*^](?=[0-9-])|(?<=[{lower}{quotes}])\.(?=[{upper}{quotes}])"
            rf"|(?<=[{alpha}]),(?=[{alpha}])|(?<=[{alpha}0-9])(?:{_HYPHENS})(?=[{alpha}])|(?<=[{alpha}0-9])[:<>=/](?=[{alpha}])"
        ).finditer,
        address=re.compile(
            rf"(?:[\w+\-.]{{2,}}://)?(?:\S+(?::\S*)?@)?(?:{_ADDRESS}|{_HOST}[{lower}]{{2,63}})(?::\d{{2,5}})?(?:[/?#]\S*)?$"
        ).match,
    )


def _class(characters: Iterable[str]) -> str:
    """Return ascending characters as the inside of a character class, with runs as ranges: `abcx` becomes `a-cx-x`."""
    runs: list[list[str]] = []
    for character in characters:
        if runs and ord(character) == ord(runs[-1][1]) + 1:
            runs[-1][1] = character
        else:
            runs.append([character, character])
    return "".join(f"{first}-{last}" for first, last in runs)
