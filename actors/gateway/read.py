"""Read sampled answers: token ids into reasoning, content and tool calls. Knows transformers' response parser.

The grammar of answers is a response template: the checkpoint's own (`response_template` in its tokenizer's
configuration), else that of one of the families here, chosen by how the chat template writes a call.

    hermes   <tool_call>{"name": "act", "arguments": {"action": "look"}}</tool_call>               Qwen 2.5, Qwen 3
    xml      <tool_call><function=act><parameter=action>look</parameter></function></tool_call>    Qwen 3 Coder, 3.5
    llama3   {"name": "act", "parameters": {"action": "look"}}                                     Llama 3

Or a class of one's own, `module:Class`: made with the tokenizer, with `read(text, begun, tools) -> Message`, which
raises ValueError for an answer that it cannot read.

Invariants
- Every answer is read. One whose calls are malformed or cut off is content, all of it, and not valid: a client never
  sees half a call.
- A call counts only if it is closed, and if nothing in it was skipped: arguments are never silently emptied.
- Without tools in the request no calls are looked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast

from actors.gateway.messages import Message, Tool, ToolCall
from actors.gateway.render import Renderer
from actors.tokens import decode_response
from services.errors import ModelUnavailable, first_line
from services.plugins import PluginError, load, raised

FinishReason = Literal["stop", "length", "tool_calls"]

_END = "\x00zqendqz\x00"
"""What the families' templates see where an answer ended by itself."""
_SKIPPED: Mapping[str, object] = MappingProxyType({"open": "<think>", "close": "</think>", "content": "text"})
_CALLS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "hermes": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
        },
        "xml": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
            "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
        },
        "llama3": {
            "open_pattern": r"\A\s*(?:<\|python_tag\|>)?(?=\s*\{\s*\"name\")",
            "close": _END,
            "repeats": True,
            "content": "json",
            "transform": {"name": "{content.name}", "arguments": "{content.parameters}"},
        },
    }
)
FAMILIES = tuple(_CALLS)
"""Names that `reader` may have besides `auto` and `module:Class`."""


class Unreadable(ValueError):
    """An answer has the beginnings of a tool call, and is none."""


class OwnReader(Protocol):
    """A reader of one's own."""

    def read(self, text: str, begun: str, tools: Sequence[Tool]) -> Message:
        """The answer as a message.

        Args:
            text: what was sampled, without its end.
            begun: what the chat template had begun of it.
            tools: that the request declared.

        Raises:
            ValueError: it cannot be read.
        """


@dataclass(frozen=True, slots=True)
class Reading:
    """A sampled answer as a client gets it, and what later prompts repeat of it.

    Attributes:
        message: of the assistant.
        finish_reason: `length`: it was cut at the token limit.
        valid: readable, not cut, of known tools, with objects as arguments.
        text: the whole answer, without its end.
        kept: number of the sampled ids that later prompts go on from: those before the token that ended it, or before a
            stop string.
        leftover: text before a stop string that begins within a token, which is not among the kept ones.
        unreadable: why it could not be read; empty if it could.
    """

    message: Message
    finish_reason: FinishReason
    valid: bool
    text: str
    kept: int
    leftover: str = ""
    unreadable: str = ""


class AnswerReader:
    """Reads the answers of one model.

    Args:
        renderer: of the model.
        reader: `auto`, one of `FAMILIES`, or `module:Class`.
        key: of the configuration, for messages.

    Attributes:
        name: what reads the answers: `the model's response_template`, a family, `module:Class`, or `text` where calls
            are not recognised.

    Raises:
        PluginError: the class cannot be loaded or made.
        ModelUnavailable: the checkpoint's response template is invalid.
    """

    def __init__(self, renderer: Renderer, reader: str = "auto", key: str = "agent.reader") -> None:
        self._tokenizer = renderer.tokenizer
        self._own: OwnReader | None = None
        self._of_checkpoint = False
        self._tag = ""
        self.name = reader
        if ":" in reader:
            self._own = _own_reader(key, reader, self._tokenizer)
            return
        template = getattr(self._tokenizer, "response_template", None) if reader == "auto" else None
        self._of_checkpoint = template is not None
        if template is None:
            family = _family(renderer.facts.call) if reader == "auto" else reader
            template, self.name = _template(family), family or "text"
        else:
            self.name = "the model's response_template"
        calls = template.get("fields", {}).get("tool_calls", {})
        self._tag = calls.get("content_args", {}).get("tag_pattern", "")
        self._with_tools, self._without_tools = _loaded(template), _loaded(_without_calls(template))

    def read(
        self,
        begun: str,
        ids: Sequence[int],
        *,
        finished: bool,
        tools: Sequence[Tool] = (),
        parallel: bool = True,
        stop: str | None = None,
    ) -> Reading:
        """Read a sampled answer.

        Args:
            begun: what the chat template had begun of it, as in `Prompt.begun`.
            ids: sampled tokens.
            finished: whether it ended by itself: by its last token, or by `stop`.
            tools: that the request declared.
            parallel: whether several calls are wanted; otherwise the first one counts.
            stop: the stop string that ended it.
        """
        by_token = finished and stop is None
        text = decode_response(self._tokenizer, ids, by_token)
        kept, leftover = len(ids) - by_token, ""
        if stop is not None and stop in text:
            text = text[: text.index(stop)]
            kept, leftover = self._before(ids, text)
        end = self._tokenizer.decode(ids[-1:], skip_special_tokens=False) if by_token else ""
        unreadable = ""
        try:
            message = self._message(text, end, begun, tools, finished)
        except Unreadable as error:
            message, unreadable = Message("assistant", text), str(error)
        if not parallel and len(message.tool_calls) > 1:
            message = Message("assistant", message.content, message.reasoning, message.tool_calls[:1])
        ended: FinishReason = "tool_calls" if message.tool_calls else "stop"
        return Reading(
            message=message,
            finish_reason=ended if finished else "length",
            valid=finished and not unreadable and _all_known(message.tool_calls, tools),
            text=text,
            kept=kept,
            leftover=leftover,
            unreadable=unreadable,
        )

    def _message(self, text: str, end: str, begun: str, tools: Sequence[Tool], finished: bool) -> Message:
        """The answer as a message. Raises Unreadable."""
        if self._own is not None:
            return self._by_own(self._own, text, begun, tools)
        if self._of_checkpoint:
            # Where nothing ended the answer, one more character lets the parser settle on what it has read.
            fed = text + (end or "\n")
        else:
            fed = text + (_END if finished else "\n")
            begun = begun[max(begun.find("<think>"), 0) :] if "<think>" in begun else ""
        template = self._with_tools if tools else self._without_tools
        try:
            parser = self._tokenizer.get_response_parser(template, prefix=begun, tools=[dict(tool) for tool in tools])
            events = parser.feed(fed)
            read, _ = parser.finalize()
        except Exception as error:  # of a parser of somebody else's, on whatever a policy writes
            raise Unreadable(first_line(error)) from None
        self._require_whole(events)
        calls = read.get("tool_calls") or []
        return Message(
            "assistant",
            _text(read.get("content")),
            _text(read.get("thinking", read.get("reasoning_content"))),
            tuple(_call(call) for call in (calls if isinstance(calls, list) else [calls])),
        )

    def _require_whole(self, events: Sequence[Mapping[str, object]]) -> None:
        """Raise Unreadable unless every call that was begun is closed, and nothing in it was skipped."""
        body, is_open = "", False
        for event in events:
            if event["field"] != "tool_calls":
                continue
            if event["type"] == "region_open":
                body, is_open = "", True
            elif event["type"] == "region_chunk":
                body += str(event["text"])
            else:
                is_open = False
                if self._tag and (rest := re.sub(self._tag, "", body, flags=re.DOTALL).strip()):
                    raise Unreadable(f"a tool call contains {rest[:40]!r}")
        if is_open:
            raise Unreadable("a tool call is not closed")

    def _by_own(self, own: OwnReader, text: str, begun: str, tools: Sequence[Tool]) -> Message:
        try:
            message = own.read(text, begun, tools)
        except ValueError as error:
            raise Unreadable(first_line(error)) from None
        except Exception as error:
            raise PluginError(f"{self.name}: {raised(error)}") from error
        if not isinstance(message, Message) or message.role != "assistant":
            raise PluginError(f"{self.name}: read must return an assistant's Message, got {message!r:.80}")
        return message

    def _before(self, ids: Sequence[int], text: str) -> tuple[int, str]:
        """How many tokens lie wholly before the end of a text that they begin with, and the text that is left over."""
        for kept in range(len(ids), 0, -1):
            before = decode_response(self._tokenizer, ids[:kept], False)
            if text.startswith(before):
                return kept, text[len(before) :]
        return 0, text


def _own_reader(key: str, reference: str, tokenizer: Any) -> OwnReader:
    plugin = load(key, reference, built_in={}, arguments=("tokenizer",))
    made = plugin.call(tokenizer)
    if not callable(getattr(made, "read", None)):
        raise PluginError(f"{plugin.label}: the class has no method 'read': it needs read(text, begun, tools)")
    return cast(OwnReader, made)


def _family(call: str) -> str:
    """The family of a chat template, given what it writes for a call; empty if it is none of them."""
    if "<function=" in call:
        return "xml"
    if "<tool_call>" in call and re.search(r"<tool_call>\s*\{\s*\"name\"", call):
        return "hermes"
    return "llama3" if re.search(r"\{\s*\"name\".*\"parameters\"", call) else ""


def _template(family: str) -> dict[str, Any]:
    """The response template of a family; of no family: thoughts and content."""
    fields = {
        "thinking": {**_SKIPPED, "repeats": True, "join": "\n"},
        "content": {"close": _END, "content": "text", "repeats": True, "join": "\n"},
    }
    if family:
        fields["tool_calls"] = dict(_CALLS[family])
    return {"start_anchor_pattern": "(?=<think>)", "fields": fields}


def _without_calls(template: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: field for name, field in template.get("fields", {}).items() if name != "tool_calls"}
    return {**template, "fields": fields}


def _loaded(template: dict[str, Any]) -> Any:
    from transformers.utils.chat_parsing.response_templates import load_response_template

    try:
        return load_response_template(template)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelUnavailable(f"the model's response_template is invalid: {first_line(error)}") from None


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()


def _call(read: object) -> ToolCall:
    """A call as a response template yields it. Raises Unreadable where it is none."""
    made = read.get("function", read) if isinstance(read, dict) else None
    if not isinstance(made, dict) or not isinstance(made.get("name"), str) or not made["name"]:
        raise Unreadable("a tool call has no name")
    if "arguments" not in made:
        raise Unreadable("a tool call has no arguments")
    arguments = made["arguments"]
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise Unreadable(f"the arguments of a tool call are not JSON: {error}") from None
    id = read.get("id", made.get("id")) if isinstance(read, dict) else None
    return ToolCall(made["name"], arguments, id if isinstance(id, str) else "")


def _all_known(calls: Sequence[ToolCall], tools: Sequence[Tool]) -> bool:
    """Whether all calls are of declared tools, with objects as arguments."""
    names = {function.get("name") for tool in tools if isinstance(function := tool.get("function"), Mapping)}
    return all(call.name in names and call.parsed() is not None for call in calls)
