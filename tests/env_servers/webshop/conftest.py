"""The small shop, the shop of generated products, and the folders of official data and of recordings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from env_servers.webshop import environment
from env_servers.webshop.load import open_shop
from env_servers.webshop.play import Play
from env_servers.webshop.settings import DATA_VARIABLE, PREFIX, WebShopSettings
from env_servers.webshop.shop import Shop
from tests import needs
from tests.env_servers.webshop.small_shop import Record, build_record, build_shop
from tests.official_data import folder_of

SHARED = Path(__file__).parents[4] / "shared"


@pytest.fixture(scope="session")
def record() -> Callable[..., Record]:
    """Builds an official product record: `record(asin, name, **fields)`."""
    return build_record


@pytest.fixture(scope="session")
def small_shop() -> Shop:
    return build_shop()


@pytest.fixture
def play(small_shop: Shop) -> Play:
    """An episode about a red and black chair."""
    wanted = {("color", "red | black"), ("size", "set of 2"), ("style", "plain")}
    return Play(small_shop, next(goal for goal in small_shop.goals if set(goal.options) == wanted))


@pytest.fixture(scope="session")
def generated_shop() -> Shop:
    return open_shop(WebShopSettings(tagger="stop-words"))


@pytest.fixture
def plain_surroundings(generated_shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The environment on generated products, whatever the surroundings say; call it to set its variables."""
    for name in WebShopSettings.model_fields:
        monkeypatch.delenv(f"{PREFIX}{name.upper()}", raising=False)
    made_by_default = WebShopSettings()

    def opened(chosen: WebShopSettings) -> Shop:
        same = (chosen.data, chosen.goals) == (made_by_default.data, made_by_default.goals)
        return generated_shop if same else open_shop(chosen)

    def surround(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"{PREFIX}{name.upper()}", value)
        environment.settings.cache_clear()
        environment.shop.cache_clear()

    monkeypatch.setattr(environment, "open_shop", opened)
    surround()
    yield surround
    environment.settings.cache_clear()
    environment.shop.cache_clear()


@pytest.fixture(scope="session")
def official_folder() -> Path:
    """The folder of the official files: that of `WEBSHOP_DATA`, else the one beside the checkout."""
    folder = folder_of(DATA_VARIABLE) or SHARED / "data" / "webshop"
    if not folder.is_dir():
        pytest.skip(needs.WEBSHOP)
    return folder


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of what was recorded from the original."""
    return Path(os.environ.get("REFERENCE_DIR") or SHARED / "reference")
