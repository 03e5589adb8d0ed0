"""Anthropic's Messages API by translation: requests into messages, answers into content blocks and events.

Claude Code and Anthropic's SDKs use `POST /v1/messages` and `POST /v1/messages/count_tokens`. What is honoured, imposed
and refused is as for OpenAI's routes (`wire.py`), to which a request is translated first.

Invariants
- The sum of a stream's events is the plain response.
- Thinking blocks that a client sends back are reasoning, which is no part of a message's identity; their signatures are
  not checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from actors.gateway import wire
from actors.gateway.calls import Pending
from actors.gateway.errors import Refused
from actors.gateway.messages import Message

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_KINDS = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
_RENAMED = {"stop_sequences": "stop", "max_tokens": "max_tokens"}
_PASSED = ("model", "temperature", "top_p", "top_k", "stream", "metadata")


def messages_request(body: Mapping[str, Any], headers: Mapping[str, str], rules: wire.Rules) -> wire.Request:
    """A request to `/v1/messages`. Raises Refused."""
    chat: dict[str, Any] = {name: body[name] for name in _PASSED if name in body}
    chat |= {to: body[name] for name, to in _RENAMED.items() if name in body}
    chat["messages"] = [*_system(body.get("system")), *_messages(body.get("messages"))]
    chat["tools"] = [_tool(tool, number) for number, tool in enumerate(_list(body.get("tools"), "tools"))]
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping):
        kind = choice.get("type")
        chat["tool_choice"] = {"any": "required", "tool": {"type": "function"}}.get(str(kind), kind)
        chat["parallel_tool_calls"] = choice.get("disable_parallel_tool_use") is not True
    return wire.chat_request(chat, headers, rules)


class MessagesForm:
    """How the Messages API writes answers; see `app.Form`."""

    def plain(self, answer: wire.Answer, request: wire.Request) -> dict[str, Any]:
        """The body of a plain response."""
        return _head(answer.id, answer.model) | {
            "content": _blocks(answer),
            "stop_reason": _reason(answer),
            "stop_sequence": answer.stopped_by,
            "usage": {"input_tokens": answer.prompt_tokens, "output_tokens": answer.completion_tokens},
        }

    def opening(self, pending: Pending) -> Iterator[bytes]:
        """The events that come before there is an answer."""
        usage = {"input_tokens": len(pending.call.prompt.ids), "output_tokens": 0}
        message = _head(pending.id, pending.request.model) | {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        yield _event({"type": "message_start", "message": message})
        yield _event({"type": "ping"})

    def events(self, answer: wire.Answer, request: wire.Request) -> Iterator[bytes]:
        """The other events of a stream."""
        for index, block in enumerate(_blocks(answer)):
            start, deltas = _begun(block)
            yield _event({"type": "content_block_start", "index": index, "content_block": start})
            for delta in deltas:
                yield _event({"type": "content_block_delta", "index": index, "delta": delta})
            yield _event({"type": "content_block_stop", "index": index})
        ended = {"stop_reason": _reason(answer), "stop_sequence": answer.stopped_by}
        usage = {"output_tokens": answer.completion_tokens}
        yield _event({"type": "message_delta", "delta": ended, "usage": usage})
        yield _event({"type": "message_stop"})

    def failure(self, refused: Refused) -> Iterator[bytes]:
        """The event of a stream that ends without an answer."""
        yield _event(self.refusal(refused))

    def refusal(self, refused: Refused) -> dict[str, Any]:
        """The body of a refusal."""
        kind = _KINDS.get(refused.status, "api_error" if refused.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": refused.message}}


def _system(system: object) -> Iterator[dict[str, Any]]:
    if system is None or system == "":
        return
    if isinstance(system, str):
        yield {"role": "system", "content": system}
        return
    yield {"role": "system", "content": [_text_part(block, "system") for block in _list(system, "system")]}


def _messages(messages: object) -> Iterator[dict[str, Any]]:
    """Messages in OpenAI's form. The results of tools are messages of their own there."""
    for number, message in enumerate(_list(messages, "messages")):
        place = f"messages[{number}]"
        if not isinstance(message, Mapping) or message.get("role") not in ("user", "assistant", "system"):
            raise _invalid(f"{place}.role must be user or assistant")
        content = message.get("content")
        if isinstance(content, str):
            yield {"role": message["role"], "content": content}
        elif message["role"] == "assistant":
            yield _answer(_list(content, f"{place}.content"), place)
        else:
            yield from _asked(message["role"], _list(content, f"{place}.content"), place)


def _asked(role: str, blocks: list[Any], place: str) -> Iterator[dict[str, Any]]:
    texts = []
    for block in blocks:
        if isinstance(block, Mapping) and block.get("type") == "tool_result":
            content = block.get("content")
            if isinstance(content, list):
                content = [_text_part(part, place) for part in content]
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
        else:
            texts.append(_text_part(block, place))
    if texts:
        yield {"role": role, "content": texts}


def _answer(blocks: list[Any], place: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            texts.append(_text_part(block, place))
    message: dict[str, Any] = {"role": "assistant", "content": texts, "reasoning_content": "".join(thoughts)}
    return message | {"tool_calls": calls} if calls else message


def _text_part(block: object, place: str) -> dict[str, Any]:
    if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
        raise _invalid(f"{place}: a content block must be an object with a type")
    return {"type": block["type"], "text": block.get("text")}


def _tool(tool: object, number: int) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str) or "input_schema" not in tool:
        raise _invalid(f"tools[{number}] must have a name and an input_schema: tools of the server are not supported")
    function = {"name": tool["name"], "description": tool.get("description", ""), "parameters": tool["input_schema"]}
    return {"type": "function", "function": function}


def _list(value: object, place: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _invalid(f"{place} must be a list")
    return value


def _invalid(message: str) -> Refused:
    return Refused(400, "invalid_value", message)


def _head(id: str, model: str) -> dict[str, Any]:
    return {"id": f"msg_{id}", "type": "message", "role": "assistant", "model": model}


def _reason(answer: wire.Answer) -> str:
    return "stop_sequence" if answer.stopped_by is not None else _REASONS[answer.finish_reason]


def _blocks(answer: wire.Answer) -> list[dict[str, Any]]:
    """The content blocks of an answer: thought, text, calls."""
    message: Message = answer.message
    blocks: list[dict[str, Any]] = []
    if message.reasoning:
        blocks.append({"type": "thinking", "thinking": message.reasoning, "signature": ""})
    if message.content or not message.tool_calls:
        blocks.append({"type": "text", "text": message.content})
    for number, call in enumerate(message.tool_calls):
        id = "toolu_" + wire.tool_call_id(answer.id, number).removeprefix("call_")
        arguments = call.parsed()
        blocks.append({"type": "tool_use", "id": id, "name": call.name, "input": dict(arguments or {})})
    return blocks


def _begun(block: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block as its first event has it, and the deltas that complete it."""
    match block["type"]:
        case "tool_use":
            text = orjson.dumps(block["input"]).decode()
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": text}]
        case "thinking":
            begun = {"type": "thinking", "thinking": "", "signature": ""}
            return begun, [{"type": "thinking_delta", "thinking": block["thinking"]}]
    return {"type": "text", "text": ""}, [{"type": "text_delta", "text": block["text"]}] if block["text"] else []


def _event(data: Mapping[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: ".encode() + orjson.dumps(data) + b"\n\n"
