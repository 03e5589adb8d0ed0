"""Which API models play, where they are, and what they cost: options, environment variables and their checks.

Invariants
- The key comes from `OPENAI_API_KEY`, or from the file that `OPENAI_API_KEY_FILE` names; never from the command line.
- A URL with a user or a password in it is refused, and every message shows it without its query.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import SecretStr
from yarl import URL

from env_servers.clients.bodies import server_url
from services.config.load import ConfigError
from services.control.settings import ControlRefused, token_from

PREFIX = "api:"
"""Begins the name of a policy that is an API model: `api:gpt-5-mini`."""
URL_VARIABLE, KEY_VARIABLE = "OPENAI_BASE_URL", "OPENAI_API_KEY"
OPENAI = "https://api.openai.com/v1"
MOST_AT_ONCE = 1024

Route = Literal["chat", "completions"]


@dataclass(frozen=True, slots=True)
class Price:
    """What a million tokens cost, in a currency of the user's choice."""

    prompt: float
    response: float


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """How API models are played with.

    Attributes:
        url: base URL of the API, such as `http://127.0.0.1:8000/v1`; None: `OPENAI_BASE_URL`, else OpenAI's.
        at_once: episodes played concurrently.
        timeout_s: seconds to wait for one response. It is then requested again; a model that does not respond for two
            more of these is given up for this episode.
        route: `chat`: the prompt as messages. `completions`: as one text, as a base model reads it.
        prices: by the model's name; `""` is for all others.
        transcripts: file to write every episode to, as JSON lines; None: none.

    Raises:
        ConfigError: a value is out of range.
    """

    url: str | None = None
    at_once: int = 8
    timeout_s: float = 60.0
    route: Route = "chat"
    prices: Mapping[str, Price] = field(default_factory=dict)
    transcripts: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.at_once <= MOST_AT_ONCE:
            raise ConfigError(f"episodes at once must be from 1 to {MOST_AT_ONCE}, got {self.at_once}")
        if not 0 < self.timeout_s <= 86_400:
            raise ConfigError(f"the timeout of an API model must be from 0 to 86400 seconds, got {self.timeout_s:g}")
        if self.route not in ("chat", "completions"):
            raise ConfigError(f"the route must be chat or completions, got {self.route!r:.80}")

    def price(self, model: str) -> Price | None:
        """The price of a model; None: unknown."""
        return self.prices.get(model, self.prices.get(""))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go. The key is shown in no text of this object."""

    url: URL
    key: SecretStr | None

    @property
    def shown(self) -> str:
        """The URL for messages: without its query."""
        return str(self.url.with_query(None).with_fragment(None))


def model_name(policy: str) -> str | None:
    """The name of the API model that a policy is; None: it is none.

    Raises:
        ConfigError: the name is empty, or no text.
    """
    if not policy.startswith(PREFIX):
        return None
    name = policy.removeprefix(PREFIX)
    if not name.strip() or not name.isprintable():
        raise ConfigError(f"{policy!r}: the model's name is missing: write {PREFIX}NAME, as in {PREFIX}gpt-5-mini")
    return name


def endpoint(options: ApiOptions, environment: Mapping[str, str] = os.environ) -> Endpoint:
    """The URL and the key to use.

    Raises:
        ConfigError: the URL is no address, or the key is missing or cannot be sent.
    """
    given = options.url or environment.get(URL_VARIABLE) or OPENAI
    name = f"--api-url (or {URL_VARIABLE})"
    try:
        url = server_url(given, "an API")
    except ValueError:
        # Not shown: whatever it is may hold a password.
        raise ConfigError(f"{name} is no address: write https://host/v1") from None
    if url.user is not None or url.password is not None:
        raise ConfigError(f"{name} holds a user or a password: leave it out, and set {KEY_VARIABLE}")
    try:
        key = token_from(KEY_VARIABLE, environment)
    except ControlRefused as error:
        raise ConfigError(str(error)) from None
    if key is None and str(url).startswith(OPENAI):
        raise ConfigError(f"{KEY_VARIABLE} is not set, and {OPENAI} needs a key; for another server give --api-url")
    if key is not None:
        key = SecretStr(key.get_secret_value().strip())
        if not (key.get_secret_value().isascii() and key.get_secret_value().isprintable()):
            raise ConfigError(f"{KEY_VARIABLE} holds characters that an HTTP header cannot: copy the key again")
    return Endpoint(url, key)


def parse_prices(texts: Sequence[str]) -> dict[str, Price]:
    """Read prices as the command line gives them: `IN,OUT`, or `NAME=IN,OUT` for one model.

    Raises:
        ConfigError: a text is no price.

    Example: `["0.25,2", "large=3,15"]` is {"": Price(0.25, 2), "large": Price(3, 15)}.
    """
    prices = {}
    for text in texts:
        model, _, numbers = text.rpartition("=")
        try:
            prompt, response = (float(number) for number in numbers.split(","))
        except ValueError:
            prompt = response = math.nan
        if not (0 <= prompt < math.inf and 0 <= response < math.inf):
            raise ConfigError(
                f"--price {text!r:.80} is no price: write IN,OUT for a million tokens, as in 0.25,2, or NAME=IN,OUT"
            )
        prices[model.removeprefix(PREFIX)] = Price(prompt, response)
    return prices
