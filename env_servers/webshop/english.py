"""Word lists of English tokenization, from spaCy's English data (explosion/spaCy, MIT); only words with letters.

`STOP_WORDS` is spaCy's list without entries that contain an apostrophe: they are never nouns.
"""

from __future__ import annotations

from collections.abc import Iterator

_STOP_WORDS = """
a about above across after afterwards again against all almost alone along already also although always am among
amongst amount an and another any anyhow anyone anything anyway anywhere are around as at back be became because
become becomes becoming been before beforehand behind being below beside besides between beyond both bottom but
by ca call can cannot could did do does doing done down due during each eight either eleven else elsewhere empty
enough even ever every everyone everything everywhere except few fifteen fifty first five for former formerly
forty four from front full further get give go had has have he hence her here hereafter hereby herein hereupon
hers herself him himself his how however hundred i if in indeed into is it its itself just keep last latter
latterly least less made make many may me meanwhile might mine more moreover most mostly move much must my
myself name namely neither never nevertheless next nine no nobody none noone nor not nothing now nowhere of off
often on once one only onto or other others otherwise our ours ourselves out over own part per perhaps please
put quite rather re really regarding same say see seem seemed seeming seems serious several she should show side
since six sixty so some somehow someone something sometime sometimes somewhere still such take ten than that the
their them themselves then thence there thereafter thereby therefore therein thereupon these they third this
those though three through throughout thru thus to together too top toward towards twelve twenty two under
unless until up upon us used using various very via was we well were what whatever when whence whenever where
whereafter whereas whereby wherein whereupon wherever whether which while whither who whoever whole whom whose
why will with within without would yet you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

_ENDINGS = {
    "i": "'m 'm+a",
    "i you he she it we they": "'ll 'll+'ve 'd 'd+'ve",
    "i you we they": "'ve",
    "you we they": "'re",
    "he she it": "'s",
    "who what when where why how there that this": "'s",
    "who what when where why how there that this these those": "'ll 'll+'ve 'd 'd+'ve",
    "who what when where why how there these those": "'re 've",
    "ca could do does did had may might must need ought sha should wo would": "n't n't+'ve",
    "could might must should would": "'ve",
    "ai are is was were have has dare": "n't",
    "not": "'ve",
}
"""Words → endings that may follow them, with or without the apostrophe; `+` joins several endings."""

_NO_CONTRACTIONS = frozenset({"ill", "its", "hell", "shell", "shed", "were", "well", "whore"})

_SPLIT = "y'+all how+'d+'y can+not gon+na got+ta let+'s c'm+on"

_WHOLE = """
doin' goin' nothin' nuthin' ol' somethin' lovin' havin' 'em 'nuff 'll 'd 's 'S ‘s ‘S 're 'cause 'Cause 'cos 'Cos
'coz 'Coz 'cuz 'Cuz 'bout ma'am o'clock and/or w/o a.m. p.m. co. vs. v.s. e.g. E.G. i.e. I.E. C++
Mt. Ak. Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec. Del. Feb. Fla. Ga. Ia. Id. Ill. Ind. Jan. Jul. Jun. Kan. Kans.
Ky. La. Mar. Mass. Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. S.C. Sep.
Sept. Tenn. Va. Wash. Wis. Adm. Bros. Co. Corp. D.C. Dr. Gen. Gov. Inc. Jr. Ltd. Md. Messrs. Mo. Mont. Mr. Mrs. Ms.
Ph.D. Prof. Rep. Rev. Sen. St.
a. b. c. d. e. f. g. h. i. j. k. l. m. n. o. p. q. r. s. t. u. v. w. x. y. z.
"""

_EMOTICONS = """
:o) (o: :P :-P :p :-p :O :-O :o :-o >:o :X :-X :x :-x :D :-D ;D ;-D =D 8D 8-D v.v V.V v_v V_V o_o o_O O_o O_O 0_o o_0
o.O O.o o.o 0.o o.0
"""
EMOTICONS = frozenset(_EMOTICONS.split())
"""Emoticons that contain letters. They are not split, and adjacent parts of one are joined again."""


def _exceptions() -> Iterator[tuple[str, tuple[str, ...]]]:
    for whole in (*_WHOLE.split(), *EMOTICONS):
        yield whole, (whole,)
        if whole[0].islower() and whole[-1] == "'":
            yield whole.capitalize(), (whole.capitalize(),)
    for hour in range(1, 13):
        for half in ("a.m.", "am", "p.m.", "pm"):
            yield f"{hour}{half}", (str(hour), half)
    for split in _SPLIT.split():
        yield from _spellings(tuple(split.split("+")), "'’")
    yield "yall", ("y", "all")
    for words, endings in _ENDINGS.items():
        for word in words.split():
            for ending in endings.split():
                pieces = (word, *ending.split("+"))
                yield from _spellings(pieces, "'’")
                yield from _spellings(tuple(piece.replace("'", "") for piece in pieces))


def _spellings(pieces: tuple[str, ...], apostrophes: str = "'") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the text and its pieces, as is and capitalised, with each apostrophe."""
    for first in (pieces[0], pieces[0].capitalize()):
        for apostrophe in apostrophes:
            parts = tuple(piece.replace("'", apostrophe) for piece in (first, *pieces[1:]))
            if "".join(parts).lower() not in _NO_CONTRACTIONS:
                yield "".join(parts), parts


EXCEPTIONS = dict(_exceptions())
"""Text that is exempt from the splitting rules → its tokens."""
