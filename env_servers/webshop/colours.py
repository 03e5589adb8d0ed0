"""Colour normalisation of the reward. The list is WebShop's own (princeton-nlp/WebShop, MIT), in its order.

The order matters: the first entry found anywhere in a value stands for it, so `graywash` is `ash` and not `gray`.
The original's table of sizes takes no part in the reward and is not here.
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
    """The first colour in a value, or the value. In a pair, as goals have them, a colour must be the whole entry."""
    for colour in COLOURS:
        if colour in value:
            return colour
    return value
