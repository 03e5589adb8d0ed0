"""OpenAI's JSON: requests into messages, answers into responses and server-sent events.

It decides what is honoured, imposed and refused; the same in training and in evaluation panels.

Invariants
- What changes the distribution of the answer in a way that the learner cannot follow is imposed (the run's value is
  used, and the header `x-anchorage-imposed` names the field) or refused; it is never honoured.
- Unknown fields are ignored and counted: clients send many.
- The sum of a stream's events is the plain response.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from actors.gateway.errors import Refused
from actors.gateway.messages import Message, Role, Tool, ToolCall

MOST_MESSAGES = 2048
MOST_TOOLS = 128
MOST_STOPS = 4
LONGEST_STOP = 64
FROZEN = ":frozen"
"""End of a model's name whose answers are served but not trained on."""

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "seed": (),
}
"""Sampling parameters that are the run's, with the values that change nothing."""
_UNSUPPORTED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "n": ((1,), "n must be 1: every answer of a training episode is trained on, and only one is acted upon"),
    "best_of": ((1,), "best_of must be 1: only the answer that is returned is recorded"),
    "echo": ((False,), "echo is not supported: leave it out"),
    "suffix": (("",), "suffix is not supported: leave it out"),
    "use_beam_search": ((False,), "beam search is not sampling: leave use_beam_search out"),
    "prompt_logprobs": ((), "prompt_logprobs are not computed: leave it out"),
    "top_logprobs": ((0,), "top_logprobs are not computed: leave it out; logprobs=true gives those of the answer"),
    "stop_token_ids": (([],), "stop_token_ids are not supported: use stop"),
    "continue_final_message": ((False,), "continue_final_message is not supported: end with a user or tool message"),
    "add_generation_prompt": ((True,), "add_generation_prompt=false is not supported: leave it out"),
    "chat_template": ((), "the chat template is the model's: leave chat_template out"),
    "functions": (([],), "functions are not supported: use tools"),
    "function_call": (("auto", "none"), "function_call is not supported: use tools"),
    "audio": ((), "audio is not supported: the policy reads and writes text"),
}
"""Fields that are refused: values that are harmless, and the message."""
_CONSTRAINTS = (
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding"),
    *("guided_decoding_backend", "guided_whitespace_pattern", "grammar", "json_schema", "allowed_token_ids"),
    *("bad_words", "min_tokens", "ignore_eos", "logits_processors"),
)
_HONOURED = frozenset(
    {
        *("model", "messages", "prompt", "tools", "tool_choice", "parallel_tool_calls", "response_format", "stop"),
        *("max_tokens", "max_completion_tokens", "stream", "stream_options", "logprobs", "metadata", "temperature"),
        *("user", "store", "service_tier", "modalities", "reasoning_effort", "verbosity", "prediction"),
        *("prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
        *_NEUTRAL,
        *_UNSUPPORTED,
        *_CONSTRAINTS,
    }
)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the run imposes on requests.

    Attributes:
        temperature: of the episode's ticket.
        max_response_tokens: longest answer.
        sampling: `agent.sampling`.
        constraints: `agent.constraints`.
    """

    temperature: float
    max_response_tokens: int
    sampling: Literal["impose", "refuse"] = "impose"
    constraints: Literal["refuse", "ignore"] = "refuse"


@dataclass(frozen=True, slots=True)
class Request:
    """One request for an answer, of any of the protocols.

    Attributes:
        messages: the conversation; empty for a completion.
        tools: that the model may call.
        prompt: of a completion: text or token ids; None for a conversation.
        max_tokens: longest answer.
        stop: texts that end the answer.
        parallel: whether more than one tool may be called in an answer.
        stream: whether the answer is streamed.
        usage: whether the stream ends with token counts.
        logprobs: whether the answer has log-probabilities.
        model: name of the model, as the client gave it.
        trained: whether the answer is trained on.
        anchor: that the agent gave to the state; empty: none.
        imposed: fields whose value is the run's.
        unknown: number of fields that were ignored.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    prompt: str | tuple[int, ...] | None
    max_tokens: int
    stop: tuple[str, ...]
    parallel: bool
    stream: bool
    usage: bool
    logprobs: bool
    model: str
    trained: bool
    anchor: str
    imposed: tuple[str, ...]
    unknown: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a protocol makes a response of.

    Attributes:
        id: of the call, unique in the run.
        created: Unix seconds.
        model: name that the client asked for.
        message: the answer.
        text: the answer as text, for completions.
        finish_reason: `stop`, `length` or `tool_calls`.
        prompt_tokens: number of tokens of the prompt.
        tokens: sampled tokens as text.
        logprobs: of the sampled tokens (nats).
        stopped_by: the stop text that ended the answer; None: another end.
    """

    id: str
    created: int
    model: str
    message: Message
    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    completion_tokens: int
    stopped_by: str | None = None


def read_json(body: bytes) -> dict[str, Any]:
    """The body of a request. Raises Refused."""
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refused(400, "invalid_json", f"invalid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise Refused(400, "invalid_json", "the body must be a JSON object")
    return tree


def chat_request(body: Mapping[str, Any], headers: Mapping[str, str], rules: Rules) -> Request:
    """A request to `/v1/chat/completions`. Raises Refused."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages", "messages must be a list with at least one message")
    if len(messages) > MOST_MESSAGES:
        raise _invalid("messages", f"at most {MOST_MESSAGES} messages are accepted, got {len(messages)}")
    read = tuple(_message(message, number) for number, message in enumerate(messages))
    tools, imposed = _tools(body, rules)
    return _request(body, headers, rules, messages=read, tools=tools, prompt=None, imposed=imposed)


def completion_request(body: Mapping[str, Any], headers: Mapping[str, str], rules: Rules, vocabulary: int) -> Request:
    """A request to `/v1/completions`. `vocabulary`: number of token ids. Raises Refused."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # a batch of one
    if isinstance(prompt, list):
        wrong = [token for token in prompt if not _is_int(token) or not 0 <= token < vocabulary]
        if wrong or not prompt:
            raise _invalid("prompt", f"prompt must be a text or a list of token ids below {vocabulary}")
        prompt = tuple(prompt)
    elif not isinstance(prompt, str) or not prompt:
        raise _invalid("prompt", "prompt must be a text or a list of token ids; only one prompt in a request")
    logprobs = body.get("logprobs")
    if isinstance(logprobs, int) and not isinstance(logprobs, bool):
        if logprobs > 1:
            raise _unsupported("logprobs", _UNSUPPORTED["top_logprobs"][1])
        body = {**body, "logprobs": True}
    return _request(body, headers, rules, messages=(), tools=(), prompt=prompt, imposed=[])


def _request(
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    rules: Rules,
    *,
    messages: tuple[Message, ...],
    tools: tuple[Tool, ...],
    prompt: str | tuple[int, ...] | None,
    imposed: list[str],
) -> Request:
    """What all protocols have in common."""
    _refuse_unsupported(body)
    imposed = [*_imposed_sampling(body, rules), *_imposed_constraints(body, rules), *imposed]
    model = body.get("model") if isinstance(body.get("model"), str) else "policy"
    options = body.get("stream_options")
    parallel = body.get("parallel_tool_calls")
    return Request(
        messages=messages,
        tools=tools,
        prompt=prompt,
        max_tokens=_max_tokens(body, rules),
        stop=_stop(body),
        parallel=parallel is not False,
        stream=body.get("stream") is True,
        usage=isinstance(options, Mapping) and options.get("include_usage") is True,
        logprobs=body.get("logprobs") is True,
        model=str(model)[:128],
        trained=not str(model).endswith(FROZEN) and headers.get("x-anchorage-train") != "0",
        anchor=_anchor(body, headers),
        imposed=tuple(dict.fromkeys(imposed)),
        unknown=sum(1 for name in body if name not in _HONOURED),
    )


def _message(message: object, number: int) -> Message:
    place = f"messages[{number}]"
    if not isinstance(message, Mapping):
        raise _invalid("messages", f"{place} must be an object")
    role = _ROLES.get(message["role"]) if isinstance(message.get("role"), str) else None
    if role is None:
        raise _invalid("messages", f"{place}.role must be one of {', '.join(_ROLES)}")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return Message(
        role=role,
        content=_content(message.get("content"), place),
        reasoning=reasoning if isinstance(reasoning, str) else "",
        tool_calls=_tool_calls(message.get("tool_calls"), place) if role == "assistant" else (),
        tool_call_id=_text(message.get("tool_call_id")),
        name=_text(message.get("name")) if role == "tool" else "",
    )


def _content(content: object, place: str) -> str:
    """The text of a message's content, whose parts are joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _invalid("messages", f"{place}.content must be a text or a list of parts")
    texts = []
    for part in content:
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else part
        if isinstance(part, Mapping) and part.get("type") not in ("text", "input_text", "output_text", "refusal"):
            raise Refused(
                400,
                "unsupported_content",
                f"{place}.content: parts of type {str(part.get('type'))[:40]} are not supported: the policy reads text",
                param="messages",
            )
        if not isinstance(text, str):
            raise _invalid("messages", f"{place}.content: a part has no text")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: object, place: str) -> tuple[ToolCall, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list) or len(calls) > MOST_TOOLS:
        raise _invalid("messages", f"{place}.tool_calls must be a list of at most {MOST_TOOLS} calls")
    read = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _invalid("messages", f"{place}.tool_calls: each call must have function.name and function.arguments")
        arguments = function.get("arguments", "")
        if not isinstance(arguments, str):
            arguments = orjson.dumps(arguments).decode()
        read.append(ToolCall(function["name"], arguments, _text(call.get("id"))))
    return tuple(read)


def _tools(body: Mapping[str, Any], rules: Rules) -> tuple[tuple[Tool, ...], list[str]]:
    """The tools that the model may call, and what was imposed on them."""
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    if not isinstance(tools, list) or len(tools) > MOST_TOOLS:
        raise _invalid("tools", f"tools must be a list of at most {MOST_TOOLS} tools")
    imposed = []
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _invalid("tools", f"tools[{number}] must be of type function, with function.name")
        if function.get("strict") is True:
            imposed.append("tools.strict")
    if choice == "none":
        return (), imposed
    if choice not in (None, "auto"):
        name = "a named tool" if isinstance(choice, Mapping) else str(choice)[:40]
        if rules.constraints == "refuse":
            raise _constrained("tool_choice", f"tool_choice={name}", "Use tool_choice=auto")
        imposed.append("tool_choice")
    return tuple(tools), imposed


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    for name, (harmless, message) in _UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and not _is_one_of(value, harmless):
            raise _unsupported(name, message)
    modalities = body.get("modalities")
    if modalities is not None and modalities != ["text"]:
        raise _unsupported("modalities", "only the modality text is supported: leave modalities out")


def _imposed_sampling(body: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    for name, harmless in {"temperature": (rules.temperature,), **_NEUTRAL}.items():
        value = body.get(name)
        if value is None or _is_one_of(value, harmless):
            continue
        if rules.sampling == "refuse":
            whose = f" (rollout.temperature={rules.temperature:g})" if name == "temperature" else ""
            raise Refused(
                400,
                "sampling_fixed",
                f"{name} is the run's{whose}: leave it out, or set agent.sampling=impose",
                param=name,
            )
        yield name


def _imposed_constraints(body: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    form = body.get("response_format")
    given = [name for name in _CONSTRAINTS if body.get(name) not in (None, [], {}, False, 0, "")]
    if isinstance(form, Mapping) and form.get("type", "text") != "text":
        given.append("response_format")
    for name in given:
        if rules.constraints == "refuse":
            raise _constrained(name, name, f"Leave {name} out")
        yield name


def _max_tokens(body: Mapping[str, Any], rules: Rules) -> int:
    given = [body[name] for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    for value in given:
        if not _is_int(value) or value < 1:
            raise _invalid("max_tokens", "max_tokens must be a whole number >= 1")
    return int(min([*given, rules.max_response_tokens]))


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    texts = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(texts, list) or len(texts) > MOST_STOPS:
        raise _invalid("stop", f"stop must be a text or a list of at most {MOST_STOPS} texts")
    if not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in texts):
        raise _invalid("stop", f"each stop text must have 1 to {LONGEST_STOP} characters")
    return tuple(texts)


def _anchor(body: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    metadata = body.get("metadata")
    in_body = metadata.get("anchorage_anchor") if isinstance(metadata, Mapping) else None
    return headers.get("x-anchorage-anchor") or (in_body if isinstance(in_body, str) else "")


def _is_one_of(value: object, harmless: Sequence[object]) -> bool:
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in harmless)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _invalid(param: str, message: str) -> Refused:
    return Refused(400, "invalid_value", message, param=param)


def _unsupported(param: str, message: str) -> Refused:
    return Refused(400, "unsupported_in_training", message, param=param)


def _constrained(param: str, what: str, instead: str) -> Refused:
    return Refused(
        400,
        "constrained_decoding",
        f"{what} masks tokens while sampling: the log-probabilities would be those of another distribution. {instead}, "
        "or set agent.constraints=ignore to sample without it",
        param=param,
    )


def tool_call_id(call: str, number: int) -> str:
    """Id of the `number`-th tool call of an answer: unique in the run, the same whenever the answer is sent again.

    An id that the policy wrote is not passed on: it may write one twice, and the OpenAI Agents SDK never executes a
    call whose id it has a result for.
    """
    return "call_" + hashlib.blake2b(f"{call}/{number}".encode(), digest_size=12).hexdigest()


def chat_response(answer: Answer, request: Request) -> dict[str, Any]:
    """The body of a plain response to `/v1/chat/completions`."""
    choice = {
        "index": 0,
        "finish_reason": answer.finish_reason,
        "message": _message_json(answer),
        "logprobs": _chat_logprobs(answer) if request.logprobs else None,
    }
    return _head(answer, "chat.completion") | {"choices": [choice], "usage": usage(answer)}


def completion_response(answer: Answer, request: Request) -> dict[str, Any]:
    """The body of a plain response to `/v1/completions`."""
    choice = {
        "index": 0,
        "finish_reason": answer.finish_reason,
        "text": answer.text,
        "logprobs": _completion_logprobs(answer) if request.logprobs else None,
    }
    return _head(answer, "text_completion") | {"choices": [choice], "usage": usage(answer)}


def usage(answer: Answer) -> dict[str, int]:
    """Token counts of an answer."""
    read, wrote = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}


def chat_opening(id: str, created: int, model: str) -> dict[str, Any]:
    """The first event of a stream, sent before there is an answer."""
    choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
    return {
        "id": id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [choice],
    }


def chat_events(answer: Answer, request: Request) -> Iterator[dict[str, Any]]:
    """The events of a stream after `chat_opening`."""
    head = _head(answer, "chat.completion.chunk")
    message = _message_json(answer)
    deltas: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        deltas.append({"reasoning_content": message["reasoning_content"]})
    if message["content"]:
        deltas.append({"content": message["content"]})
    for index, call in enumerate(message.get("tool_calls", ())):
        deltas.append({"tool_calls": [{"index": index, **call}]})
    logprobs = _chat_logprobs(answer) if request.logprobs else None
    for number, delta in enumerate([*deltas, {}]):
        ends = number == len(deltas)
        choice = {"index": 0, "delta": delta, "finish_reason": answer.finish_reason if ends else None}
        yield head | {"choices": [choice | {"logprobs": logprobs if ends else None}]}
    if request.usage:
        yield head | {"choices": [], "usage": usage(answer)}


def completion_events(answer: Answer, request: Request) -> Iterator[dict[str, Any]]:
    """The events of a stream of `/v1/completions`."""
    head = _head(answer, "text_completion")
    logprobs = _completion_logprobs(answer) if request.logprobs else None
    choice = {"index": 0, "text": answer.text, "finish_reason": answer.finish_reason, "logprobs": logprobs}
    yield head | {"choices": [choice]}
    if request.usage:
        yield head | {"choices": [], "usage": usage(answer)}


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model}


def _message_json(answer: Answer) -> dict[str, Any]:
    message = answer.message
    body: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
    if message.reasoning:
        body["reasoning_content"] = message.reasoning
    if message.tool_calls:
        body["content"] = message.content or None
        body["tool_calls"] = [
            {
                "id": tool_call_id(answer.id, number),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for number, call in enumerate(message.tool_calls)
        ]
    return body


def _chat_logprobs(answer: Answer) -> dict[str, Any]:
    content = [
        {"token": token, "logprob": _finite(logprob), "bytes": [*token.encode()], "top_logprobs": []}
        for token, logprob in zip(answer.tokens, answer.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(answer: Answer) -> dict[str, Any]:
    offsets = [0]
    for token in answer.tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    values = [_finite(logprob) for logprob in answer.logprobs]
    return {"tokens": [*answer.tokens], "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -9999.0
