"""WebShop as an environment: find and buy what an instruction asks for.

The pages, rules and rewards are those of princeton-nlp/WebShop (arXiv 2207.01206), without its Java, Flask and gym. The
variables of `settings` say what is sold and how it is shown; by default the catalogue is generated.

Splits, as published: `test` is the first 500 goals of the fixed order, `train` all others.

Admissible actions are `click[…]` for what can be clicked and, where there is a search bar, `search[<your query>]`,
which stands for every search. A search is understood on every page, though, as in the original.
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
    """The settings of this process; raises BrokenTask where a variable has an impossible value."""
    return read_settings()


@functools.cache
def shop() -> Shop:
    """The shop of this process; raises BrokenTask where its data cannot be used."""
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
        """Whether the open page has one. After a reset only, as `clickables`."""
        return self._playing.has_search_bar

    @property
    def clickables(self) -> tuple[str, ...]:
        """Names on the open page in the original's order, with `search`, which no click does anything to."""
        return self._playing.clickables

    @property
    def _playing(self) -> Play:
        assert self._play is not None, "reset comes first"
        return self._play

    def _goal(self, split: str, index: int) -> Goal:
        sizes = self.splits()
        if split not in sizes:
            raise UnknownTask(f"no split '{split}' here: choose one of {', '.join(sizes)}")
        if not 0 <= index < sizes[split]:
            raise UnknownTask(f"split '{split}' has tasks 0 to {sizes[split] - 1}, not {index}")
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
    """What was bought and the parts of its score, on the buying step."""
    bought = play.purchase
    if play.page_name != "done" or bought is None:
        return {}
    purchase = {"asin": bought.product.asin, "options": bought.options, "price": bought.price}
    return {"purchase": purchase, "reward_parts": bought.reward.parts}
