"""Asks one model behind an OpenAI-compatible API, and retries. The one file that sends requests to it.

Invariants
- Every request has a time limit, and so have all its retries together.
- The key is sent to the configured URL alone: redirects are not followed. It occurs in no message, no log line and no
  reply: where a server returns it, it is hidden.
- A parameter that the model does not accept is left out from then on, and named in `not_accepted`.
- Whatever a server answers ends in a `Reply`, `NoAnswer` or `ModelUnavailable`, each with one line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import urllib.request
from collections.abc import Sequence
from types import TracebackType
from urllib.parse import urlsplit

import aiohttp
import orjson

from anchorage.api_models.settings import KEY_VARIABLE, URL_VARIABLE, ApiOptions, Endpoint
from anchorage.api_models.wire import (
    LENGTH_KEYS,
    Problem,
    Reply,
    WrongAnswer,
    chat_messages,
    read_answer,
    read_problem,
    refusal_of,
    retry_after,
    unaccepted,
)
from env_servers.clients.bodies import AnswerTooLong, is_loopback, read_body
from env_servers.errors import one_line
from services.backoff import Backoff
from services.config.masking import HIDDEN, masked
from services.errors import AnchorageError, ModelUnavailable

logger = logging.getLogger(__name__)

RETRIED = frozenset({408, 409, 425, 429})
"""Statuses below 500 after which the same request may succeed; so may it after all from 500 on."""
NO_CREDIT = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
"""Codes of a 429 that no waiting cures."""
BACKOFF = Backoff(0.5, 20.0, jitter=True)
FIRST_PATIENCE_S = 15.0
"""How long a server that nobody has reached yet may refuse connections or answer what is no answer of this API."""
PATIENCE = 2.0
"""No further attempt begins after so many times `ApiOptions.timeout_s`."""
FAILURES_IN_A_ROW = 3
"""Requests without an answer after which each further one gets a single, short attempt, until one is answered."""
SHORT_S = 10.0
OPTIONAL = ("temperature", "seed")
SHORTEST_SECRET = 8
"""A shorter key, such as `none` for a server that needs none, is no secret, and may be a word of a response."""
MOST_CHANGES = 6


class NoAnswer(AnchorageError):
    """The model does not answer this request, after bounded retries; another one may be answered."""


class _Retry(Exception):
    """An attempt failed in a way that may pass, after at least `after_s` seconds.

    `foreign`: the server is away, or what it answers is nothing of this API.
    """

    def __init__(self, reason: str, after_s: float = 0.0, *, foreign: bool = False) -> None:
        super().__init__(reason)
        self.after_s = after_s
        self.foreign = foreign


class ApiModel:
    """One model. Use it within its `async with` block, on one event loop.

    Args:
        name: of the model, as the API knows it.
        endpoint: where it is.
        options: timeout and route.
        most_tokens: longest response.
        thoughts: see `read_answer`.

    Attributes:
        not_accepted: names of the parameters that the model does not accept, in the order in which that was found out.
    """

    def __init__(self, name: str, endpoint: Endpoint, options: ApiOptions, *, most_tokens: int, thoughts: bool) -> None:
        self.name = name
        self.not_accepted: list[str] = []
        self._endpoint = endpoint
        self._options = options
        self._most_tokens = most_tokens
        self._thoughts = thoughts
        self._length_key = LENGTH_KEYS[0]
        key = "" if endpoint.key is None else endpoint.key.get_secret_value()
        self._secret = key if len(key) >= SHORTEST_SECRET else ""
        self._http: aiohttp.ClientSession | None = None
        self._answered = False
        self._failures = 0

    async def __aenter__(self) -> ApiModel:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self._endpoint.key is not None:
            headers["Authorization"] = f"Bearer {self._endpoint.key.get_secret_value()}"
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._options.at_once),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # `_send` has its own
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def ask(self, prompt: Sequence[str] | str, *, temperature: float, seed: int) -> Reply:
        """The model's response.

        Args:
            prompt: the turns of a chat (see `chat_messages`), or one text for the route `completions`.
            temperature: of sampling. seed: of sampling.

        Raises:
            NoAnswer: there is none.
            ModelUnavailable: likewise, and the model has never answered.
        """
        try:
            reply = await self._retried(prompt, temperature, seed)
        except NoAnswer as error:
            self._failures += 1
            if not self._answered:
                raise ModelUnavailable(str(error)) from None
            raise
        self._answered, self._failures = True, 0
        return dataclasses.replace(reply, text=self._public(reply.text), refused=self._public(reply.refused))

    async def _retried(self, prompt: Sequence[str] | str, temperature: float, seed: int) -> Reply:
        clock = asyncio.get_running_loop().time
        started, attempts = clock(), 0
        away = self._failures >= FAILURES_IN_A_ROW
        timeout_s = min(SHORT_S, self._options.timeout_s) if away else self._options.timeout_s
        while True:
            attempts += 1
            try:
                return await self._attempt(prompt, temperature, seed, timeout_s)
            except _Retry as error:
                patience = 0.0 if away else PATIENCE * self._options.timeout_s
                if error.foreign and not self._answered:
                    patience = min(patience, FIRST_PATIENCE_S)
                delay = max(error.after_s, BACKOFF.delay(attempts))
                spent = clock() - started
                if spent + delay > patience:
                    tried = f"{attempts} attempt{'s' if attempts > 1 else ''} in {spent:.0f} s"
                    raise self._failed(f"no answer ({tried}): {error}") from None
                logger.log(logging.DEBUG if attempts == 1 else logging.INFO, "%s: retrying: %s", self._label, error)
            await asyncio.sleep(delay)

    async def _attempt(self, prompt: Sequence[str] | str, temperature: float, seed: int, timeout_s: float) -> Reply:
        """One answer, the parameters fitted to what the model accepts."""
        for _ in range(MOST_CHANGES):
            sent = self._request(prompt, temperature, seed)
            status, after_s, body = await self._send(sent, timeout_s)
            problem = read_problem(body)
            if 200 <= status < 300 and (problem is None or not problem.code):
                try:
                    return read_answer(body, thoughts=self._thoughts)
                except WrongAnswer as error:
                    raise _Retry(self._public(str(error)), foreign=True) from None
            problem = problem or Problem("")
            if status < 300:  # relays put another server's error into an answer of their own
                if not problem.code.isdecimal():
                    raise _Retry(self._public(problem.message), foreign=True)
                status = int(problem.code[:3])
            if refused := refusal_of(status, problem):
                return Reply("", refused=refused)
            name = unaccepted(problem, sent, OPTIONAL) if status in (400, 422) else None
            if name is None:
                raise self._error(status, problem, after_s)
            self._leave_out(name)
        raise self._failed("the model keeps refusing parameters of the request")

    def _request(self, prompt: Sequence[str] | str, temperature: float, seed: int) -> dict[str, object]:
        shown: dict[str, object] = (
            {"prompt": prompt} if isinstance(prompt, str) else {"messages": chat_messages(prompt)}
        )
        optional: dict[str, object] = {"temperature": temperature, "seed": seed}
        accepted = {name: value for name, value in optional.items() if name not in self.not_accepted}
        return {"model": self.name, **shown, self._length_key: self._most_tokens, **accepted}

    def _leave_out(self, name: str) -> None:
        if name == LENGTH_KEYS[0]:
            self._length_key = LENGTH_KEYS[1]
        elif name not in self.not_accepted:
            self.not_accepted.append(name)
            logger.info("%s does not accept %s: it is left out", self._label, name)

    async def _send(self, sent: dict[str, object], timeout_s: float) -> tuple[int, float, bytes]:
        """Status, seconds of Retry-After, and body."""
        assert self._http is not None, "outside of its block"
        path = "completions" if "prompt" in sent else "chat/completions"
        url = self._endpoint.url
        url = (url / path).with_query(url.query)
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._http.post(url, data=orjson.dumps(sent), allow_redirects=False, proxy=_proxy(str(url))) as answer,
            ):
                if 300 <= answer.status < 400:
                    where = masked(self._line(answer.headers.get("Location", "")))
                    raise self._failed(
                        f"status {answer.status}: redirects to {where or 'nowhere'}; is --api-url right?"
                    )
                # Before anything is cut from it: a part of a key is not found.
                body = await self._hidden(answer)
                return answer.status, retry_after(answer.headers.get("Retry-After", "")), body
        except TimeoutError:
            raise _Retry(f"no answer within {timeout_s:g} s") from None
        except AnswerTooLong as error:
            raise _Retry(str(error), foreign=True) from None
        except (aiohttp.ClientSSLError, aiohttp.InvalidURL) as error:
            raise self._failed(self._line(error)) from None
        except aiohttp.ClientConnectorError as error:
            raise _Retry(f"{self._line(error)}; is the server running?", foreign=True) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = self._line(error) or type(error).__name__
            raise _Retry(reason, foreign=isinstance(error, aiohttp.ClientResponseError)) from None

    def _error(self, status: int, problem: Problem, after_s: float) -> Exception:
        """What an answer with an error raises."""
        said = f"status {status}{': ' if problem.message else ''}{self._public(problem.message)}"
        if (status in RETRIED or status >= 500) and problem.code not in NO_CREDIT:
            return _Retry(said, after_s)
        hint = "is the URL right?"
        if status in (401, 403):
            wrong = "is not set" if self._endpoint.key is None else "is not accepted"
            hint = f"{KEY_VARIABLE} {wrong}"
        elif status in (404, 405):
            hint = f"check the model's name, and --api-url (or {URL_VARIABLE}), which often ends in /v1"
            if self._options.route == "chat":
                hint += "; a server of base models may need --api-route completions"
        elif problem.code in NO_CREDIT:
            hint = "the account has no credit left"
        elif "chat template" in problem.message.lower():
            hint = "give the server a chat template, or use --api-route completions"
        elif status in (400, 422):
            hint = "the server does not accept the request"
        return self._failed(f"{said}; {hint}")

    def _failed(self, what: str) -> NoAnswer:
        return NoAnswer(f"{self._label}: {what}")

    @property
    def _label(self) -> str:
        return f"{self.name} at {self._endpoint.shown}"

    async def _hidden(self, answer: aiohttp.ClientResponse) -> bytes:
        """The body of an answer without the key."""
        body = await read_body(answer)
        return body.replace(self._secret.encode(), HIDDEN.encode()) if self._secret else body

    def _public(self, text: str) -> str:
        """A server's text without the key."""
        return text.replace(self._secret, HIDDEN) if self._secret else text

    def _line(self, text: object) -> str:
        """As `_public`, as one line."""
        return one_line(self._public(str(text)))


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL. Not aiohttp's `trust_env`, which also reads `.netrc` for keys."""
    parts = urlsplit(url)
    if is_loopback(parts.hostname or "") or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)
