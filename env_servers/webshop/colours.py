"""Colour normalisation of the reward. The list and its order are WebShop's (princeton-nlp/WebShop, MIT).

The order matters: the first entry that occurs anywhere in a value replaces it, so `graywash` is `ash`, not `gray`.
The original's table of sizes does not affect the reward and is left out.
"""

from __future__ import annotations

import functools

CACHED_VALUES = 1 << 14
_WORDS = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo "
    "caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream "
    "crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather "
    "indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha "
    "multicolor mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal "
    "rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise "
    "violet walnut wheat white wine yellow"
)
COLOURS = tuple(_WORDS.split())


@functools.lru_cache(CACHED_VALUES)
def normalise_colour(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Return the first colour that occurs in a value, or the value itself if none does.

    In a (name, value) pair of a goal only an entry that equals a colour counts, as in the original.

    Example:
        normalise_colour("dark red")             # "dark"
        normalise_colour(("color", "red"))       # "red"
        normalise_colour(("color", "dark red"))  # ("color", "dark red")
    """
    for colour in COLOURS:
        if colour in value:
            return colour
    return value
