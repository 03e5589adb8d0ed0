"""WebShop as an environment: find and buy the product that an instruction describes.

Pages, rules and rewards are those of princeton-nlp/WebShop (arXiv 2207.01206), without Java, Flask and gym. The
environment variables of `settings` select the catalogue and the form of the pages; the default catalogue is generated.

Splits, as published: `test` is the first 500 goals of the fixed order, `train` all others.

Admissible actions are `click[…]` for every clickable name and, on a page with a search bar, `search[<your query>]`,
which stands for any search. As in the original, a search works on every page.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import ClassVar

from env_servers.environment import Environment, Observation, UnknownTask
from env_servers.protocol import FREE_TEXT, ActionForm
from env_servers.webshop.expert import Expert
from env_servers.webshop.goals import Goal
from env_servers.webshop.load import open_shop, source_name
from env_servers.webshop.play import Play, can_be_clicked
from env_servers.webshop.settings import WebShopSettings, read_settings
from env_servers.webshop.shop import Shop

TEST_GOALS = 500
CACHED_PAGES = 1024
SEARCH_ACTION = f"search[{FREE_TEXT}]"


@functools.cache
def settings() -> WebShopSettings:
    """Return the settings of this process. Raises BrokenTask if a variable is invalid."""
    return read_settings()


@functools.cache
def shop() -> Shop:
    """Return the shop of this process. Raises BrokenTask if its data is invalid."""
    return open_shop(settings())


class WebShop(Environment):
    """One session of WebShop."""

    name: ClassVar[str] = "webshop"
    action_form: ClassVar[ActionForm] = "lower_case"

    __slots__ = ("_expert", "_facts", "_play", "_settings")

    def __init__(self) -> None:
        self._settings = settings()
        self._play: Play | None = None
        self._expert: Expert | None = None
        self._facts: dict[str, object] = {}

    @classmethod
    def splits(cls) -> Mapping[str, int]:
        goals = len(shop().goals)
        sizes = {"train": goals - TEST_GOALS, "test": min(goals, TEST_GOALS)}
        return {split: size for split, size in sizes.items() if size > 0}

    @classmethod
    def about(cls) -> Mapping[str, str]:
        chosen = settings()
        decisive = (shop().digest, chosen.goals, chosen.observation, chosen.attributes, chosen.reward)
        return {
            "engine": f"native, {chosen.observation} observations, nouns by {shop().tagger.name}",
            "source": f"{source_name(chosen)}, {chosen.goals} goals",
            "fingerprint": hashlib.blake2b(repr(decisive).encode(), digest_size=16).hexdigest(),
        }

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        goal = self._goal(split, index)
        self._play = Play(shop(), goal, attributes_button=self._settings.attributes)
        self._expert = Expert(self._play) if expert else None
        self._facts = {"task_type": goal.product.category, "goal": goal.instruction}
        return self._observe(self._play)

    def step(self, action: str) -> Observation:
        self._playing.step(action)
        return self._observe(self._playing)

    @property
    def has_search_bar(self) -> bool:
        """Whether the current page has a search bar. Only valid after a reset, like `clickables`."""
        return self._playing.has_search_bar

    @property
    def clickables(self) -> tuple[str, ...]:
        """Clickable names of the page in the original's order; includes `search`, on which a click has no effect."""
        return self._playing.clickables

    @property
    def _playing(self) -> Play:
        assert self._play is not None, "step before reset"
        return self._play

    def _goal(self, split: str, index: int) -> Goal:
        sizes = self.splits()
        if split not in sizes:
            raise UnknownTask(f"unknown split '{split}': choose one of {', '.join(sizes)}")
        if not 0 <= index < sizes[split]:
            raise UnknownTask(f"index out of range: split '{split}' has tasks 0 to {sizes[split] - 1}, got {index}")
        return shop().goals[index if split == "test" else index + TEST_GOALS]

    def _observe(self, play: Play) -> Observation:
        done = play.page_name == "done"
        score = play.purchase.reward.score if done and play.purchase is not None else 0.0
        won = score == 1.0
        return Observation(
            text=play.observe(self._settings.observation),
            reward=score if self._settings.reward == "score" else float(won),
            terminated=done,
            admissible=_admissible(play),
            state=play.digest(self._settings.observation),
            facts={**self._facts, "won": won, "score": score, **_purchase_facts(play)},
            expert=self._expert.next_action() if self._expert is not None else None,
        )


def _admissible(play: Play) -> tuple[str, ...]:
    return (SEARCH_ACTION,) if play.has_search_bar else _clicks(play.clickables)


@functools.lru_cache(CACHED_PAGES)
def _clicks(clickables: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(f"click[{name}]" for name in clickables if can_be_clicked(name)))


def _purchase_facts(play: Play) -> dict[str, object]:
    """Return the purchase and the parts of its score; empty before the purchase."""
    bought = play.purchase
    if play.page_name != "done" or bought is None:
        return {}
    purchase = {"asin": bought.product.asin, "options": bought.options, "price": bought.price}
    return {"purchase": purchase, "reward_parts": bought.reward.parts}
