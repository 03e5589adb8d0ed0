"""The JSON of an OpenAI-compatible API: requests, what an answer means, and what is wrong with it. Sends nothing.

Servers that call themselves compatible differ, so whatever an answer holds is checked and nothing is required that an
episode can do without.

Invariants
- Of an answer that is not one of this API only `WrongAnswer` is raised, with one line on what came instead.
- A refusal, an empty answer and a prompt that the server will not take are a `Reply` without text: the policy's doing.
"""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from env_servers.clients.foreign_json import read_json
from env_servers.errors import one_line

MOST_TOKENS = 10**9
"""More tokens of one answer are a wrong figure."""
LENGTH_KEYS = ("max_tokens", "max_completion_tokens")
"""What APIs call the longest response: the name that all servers know but OpenAI's own for its newer models, and that
one's. A server that wants the second says so."""
SHOWN = 80

_TOO_LONG = re.compile(r"context[ _](length|window|size)|too long|too many tokens", re.IGNORECASE)
_FILTERED = re.compile(r"content[ _](filter|management|policy)", re.IGNORECASE)
_WORDS = re.compile(r"\w+")


class WrongAnswer(ValueError):
    """The server's answer is none of this API. The message says in one line what it is."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a model.

    Attributes:
        text: the whole response, a thought that the server returned separately included.
        finished: it ended by itself, not at the limit of tokens.
        refused: why there is no text; empty where there is some.
        tokens_in / tokens_out: as the server counted them; None: it did not say.
    """

    text: str
    finished: bool = True
    refused: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """What an answer with an error says.

    Attributes:
        message: one line; empty where it says nothing.
        code: of the error, in lower case, its type where it has no code.
        parameter: of the request that it is about.
    """

    message: str
    code: str = ""
    parameter: str = ""


def chat_messages(turns: Sequence[str]) -> list[dict[str, str]]:
    """A prompt's turns as messages: the user shows, the assistant acts.

    An empty response would be a message without content, which some servers refuse: what was shown before and after it
    becomes one message.

    Example: `("You see a desk.", " look", "A pen.", "", "A pen.")` is
        user "You see a desk.", assistant " look", user "A pen.A pen."
    """
    messages: list[dict[str, str]] = []
    for number, text in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += text
        elif text:
            messages.append({"role": role, "content": text})
    return messages


def read_answer(body: bytes, *, thoughts: bool) -> Reply:
    """The reply that an answer with status 2xx holds, of either route.

    Args:
        body: of the answer.
        thoughts: put a thought that the server returned separately back before the text, in `<think>` tags.

    Raises:
        WrongAnswer: it is no answer of this API.
    """
    tree = _tree(body)
    choices = tree.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise WrongAnswer(f"an answer without choices: {one_line(body[:SHOWN].decode(errors='replace'))}")
    choice = choices[0]
    usage = tree.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    ended = choice.get("finish_reason")
    text, refused = _said(choice, thoughts=thoughts)
    if ended == "content_filter":
        text, refused = "", "the server's filter stopped the response"
    elif not text and not refused:
        refused = "an empty response" if ended != "length" else "no text within the limit of tokens"
    return Reply(
        text,
        finished=ended != "length",
        refused=refused,
        tokens_in=_count(usage.get("prompt_tokens")),
        tokens_out=_count(usage.get("completion_tokens")),
    )


def _said(choice: Mapping[str, Any], *, thoughts: bool) -> tuple[str, str]:
    """The text of a choice, and why there is none."""
    message = choice.get("message")
    if message is None and isinstance(choice.get("text"), str):
        message = {"content": choice["text"]}
    if not isinstance(message, dict):
        raise WrongAnswer(f"a choice without a message: {one_line(repr(choice)[:SHOWN])}")
    refusal = message.get("refusal")
    if isinstance(refusal, str) and refusal:
        return "", f"the model refused: {one_line(refusal)}"
    text = _text(message.get("content"))
    if not thoughts or not text or "<think>" in text:
        return text, ""
    if "</think>" in text:  # a chat template may write the opening tag into the prompt
        return f"<think>{text}", ""
    thought = message.get("reasoning_content") or message.get("reasoning")
    return (f"<think>{thought}</think>{text}" if isinstance(thought, str) and thought else text), ""


def _text(content: object) -> str:
    """The text of a message's content, which may be a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(part for part in parts if isinstance(part, str))
    raise WrongAnswer(f"a message whose content is no text: {one_line(repr(content)[:SHOWN])}")


def _tree(body: bytes) -> dict[str, Any]:
    try:
        tree = read_json(body)
    except ValueError:
        start = body[: 4 * SHOWN].decode(errors="replace").strip()
        kind = "an empty body"
        if start:
            kind = "a web page" if start.startswith("<") else "no JSON"
            kind = "an event stream" if start.startswith(("data:", "event:", ":")) else kind
        raise WrongAnswer(f"{kind} in place of an answer{f': {one_line(start[:SHOWN])}' if start else ''}") from None
    if not isinstance(tree, dict):
        raise WrongAnswer(f"no JSON object: {one_line(body[:SHOWN].decode(errors='replace'))}")
    return tree


def read_problem(body: bytes) -> Problem | None:
    """What an error says, whatever its form; None where the body is an answer without an error.

    Example: `{"error": {"message": "No such model", "code": "model_not_found"}}`, `{"detail": "Not Found"}`,
        `<html>…` are problems, `{"choices": []}` is none.
    """
    try:
        tree = _tree(body)
    except WrongAnswer as wrong:
        return Problem(str(wrong))
    error = tree.get("error")
    if error is None:
        found = next((tree[key] for key in ("message", "detail") if tree.get(key)), None)
        return None if found is None else Problem(one_line(found))
    if not isinstance(error, dict):
        return Problem(one_line(error))
    return Problem(
        one_line(error.get("message") or error),
        one_line(error.get("code") or error.get("type") or "").lower(),
        one_line(error.get("param") or ""),
    )


def refusal_of(status: int, problem: Problem) -> str:
    """Why the server will not let the model answer this prompt; empty: the error is of another kind."""
    said = f"{problem.code} {problem.message}"
    if status == 413 or (status in (400, 422) and _TOO_LONG.search(said)):
        return f"the prompt is too long: {problem.message or f'status {status}'}"
    if status in (400, 403, 422) and _FILTERED.search(said):
        return f"the server's filter refused the prompt: {problem.message}"
    return ""


def unaccepted(problem: Problem, sent: Mapping[str, object], optional: Sequence[str]) -> str | None:
    """The parameter that the server does not accept, of those that a request can do without; None: it is another one.

    Example: `{"param": "temperature", "message": "Unsupported value: 0.4"}`, and also
        `"max_tokens is not supported with this model. Use max_completion_tokens"` with `max_tokens`.
    """
    words = {problem.parameter, *_WORDS.findall(problem.message)}
    older, newer = LENGTH_KEYS
    if older in sent and newer in words:
        return older
    return next((name for name in optional if name in sent and name in words), None)


def retry_after(header: str, now: float | None = None) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 where it is neither."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - (time.time() if now is None else now)
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _count(value: object) -> int | None:
    """A number of tokens; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS else None
