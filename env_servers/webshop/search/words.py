"""Splits text into words like Lucene's StandardTokenizer: at UAX #29 word boundaries, with emoji as words.

Invariants
- Property values are those of the installed `regex`, except for pictographs: these are Unicode 12.1's, as in Lucene.
  Later versions removed hundreds of symbols (★ ♡ ☞) that are frequent in product texts, and every word counts in a
  document's length.
- Words are not modified: no case folding, no normalisation.
"""

from __future__ import annotations

import re

import regex

LONGEST = 255
"""Characters of the longest word. Longer ones are cut into words of this length."""

_PICTOGRAPHS = """
A9 AE 203C 2049 2122 2139 2194-2199 21A9-21AA 231A-231B 2328 2388 23CF 23E9-23F3 23F8-23FA 24C2 25AA-25AB 25B6 25C0
25FB-25FE 2600-2605 2607-2612 2614-2685 2690-2705 2708-2712 2714 2716 271D 2721 2728 2733-2734 2744 2747 274C 274E
2753-2755 2757 2763-2767 2795-2797 27A1 27B0 27BF 2934-2935 2B05-2B07 2B1B-2B1C 2B50 2B55 3030 303D 3297 3299
1F000-1F0FF 1F10D-1F10F 1F12F 1F16C-1F171 1F17E-1F17F 1F18E 1F191-1F19A 1F1AD-1F1E5 1F201-1F20F 1F21A 1F22F
1F232-1F23A 1F23C-1F23F 1F249-1F3FA 1F400-1F53D 1F546-1F64F 1F680-1F6FF 1F774-1F77F 1F7D5-1F7FF 1F80C-1F80F
1F848-1F84F 1F85A-1F85F 1F888-1F88F 1F8AE-1F8FF 1F90C-1F93A 1F93C-1F945 1F947-1FAFF 1FC00-1FFFD
"""


def _character_class(ranges: str) -> str:
    """Return a character class from hexadecimal ranges."""
    return "[" + "".join("-".join(rf"\U{int(end, 16):08X}" for end in part.split("-")) for part in ranges.split()) + "]"


def _with_marks(characters: str) -> str:
    """Match one of the characters with the marks attached to it (WB4)."""
    return rf"(?:{characters}[\p{{WB=Format}}\p{{WB=Extend}}\p{{WB=ZWJ}}]*+)"


def _letters_and_numbers() -> str:
    """Return the pattern of rules WB5 to WB13b."""
    letter = _with_marks(r"[\p{WB=ALetter}\p{WB=Hebrew_Letter}]")
    number = _with_marks(r"\p{WB=Numeric}")
    katakana = _with_marks(r"\p{WB=Katakana}")
    connector = _with_marks(r"\p{WB=ExtendNumLet}")
    in_letters = _with_marks(r"[\p{WB=MidLetter}\p{WB=MidNumLet}\p{WB=Single_Quote}]")
    in_numbers = _with_marks(r"[\p{WB=MidNum}\p{WB=MidNumLet}\p{WB=Single_Quote}]")
    after_hebrew = r"(?<=\p{WB=Hebrew_Letter})"
    in_hebrew = after_hebrew + _with_marks('"') + r"(?=\p{WB=Hebrew_Letter})"
    at_hebrew_end = after_hebrew + _with_marks("'")
    numbers = f"{number}(?:(?:{connector}*|{in_numbers}){number})*"
    letters = f"{letter}(?:(?:{connector}*|{in_letters}|{in_hebrew}){letter})*(?:{at_hebrew_end})?"
    part = f"(?:{katakana}(?:{connector}*{katakana})*|(?:{numbers}|{letters})+)"
    start = rf"(?=\p{{WB=ExtendNumLet}})(?<!{connector}){connector}++"  # no second attempt within a run of connectors
    return f"(?:{start})?{part}(?:{connector}+{part})*{connector}*"


def _emoji() -> str:
    """Return the pattern of UTS #51 emoji sequences: presentation, modifiers, tags, ZWJ sequences, keycaps, flags."""
    pictograph = _character_class(_PICTOGRAPHS)
    joiner = rf"\u200d(?!{pictograph}|\p{{Emoji_Modifier}})"
    mark = rf"(?:[\p{{WB=Format}}\p{{WB=Extend}}--[\uFE0E\uFE0F]]|{joiner})"
    marks = f"{mark}*+"
    one = rf"(?:{pictograph}{marks}\uFE0F?|\p{{Emoji_Modifier}}{marks})"
    tags = r"[\U000E0020-\U000E007E]+\U000E007F"
    keycap = rf"[0-9#*]{mark}*\uFE0F?\u20E3{marks}"
    flag = _with_marks(r"\p{WB=Regional_Indicator}") + "{2}"
    return rf"(?:(?<!\u200d)\u200d+)?{one}(?:{tags}|(?:\u200d+{one})*)|{keycap}|{flag}"


_WORD = regex.compile(
    "|".join(
        (
            _letters_and_numbers(),
            _emoji(),
            _with_marks(r"\p{LB=SA}") + "+",  # Thai, Lao, Khmer, Burmese: word breaks would need a dictionary
            _with_marks(r"\p{Script=Han}"),
            _with_marks(r"\p{Script=Hiragana}"),
        )
    ),
    regex.V1,
)
_ASCII_WORD = re.compile(
    r"(?<!_)_*[A-Za-z0-9]\w*(?:(?:(?<=[A-Za-z])[:.'](?=[A-Za-z])|(?<=[0-9])[.,;'](?=[0-9]))\w+)*", re.ASCII
)
_BEYOND_ASCII = re.compile(r"((?<![!-~])[!-~]*+[^\x00-\x7f][^\x00-\x20]*+)")
"""A run of non-blank characters that is not all ASCII; `split` returns ASCII text and such runs alternately."""


def words(text: str) -> list[str]:
    """Return the words of a text, in order."""
    if text.isascii():
        found = _ASCII_WORD.findall(text)
    else:
        found = []
        for number, part in enumerate(_BEYOND_ASCII.split(text)):
            found += _WORD.findall(part) if number % 2 else _ASCII_WORD.findall(part)
    if max(map(len, found), default=0) > LONGEST:
        return [word[start : start + LONGEST] for word in found for start in range(0, len(word), LONGEST)]
    return found
