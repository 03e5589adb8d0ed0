"""Render chat templates: whole conversations, and what follows an answer. Knows transformers' chat templates.

A conversation that goes on from a sampled answer is not rendered whole: the answer's ids are known, and only what
follows it is needed. `tail` renders a stub: the conversation's opening up to its first user message, an answer that is
a sentinel, and the new messages. The text behind the sentinel, from the end of the answer on, is the tail.

Example, ChatML; the policy's answer is followed by a new user message `Open it.`

    stub    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nSENTINEL<|im_end|>\\n<|im_start|>user\\nOpen it.…
    tail                                                              <|im_end|>\\n<|im_start|>user\\nOpen it.…

Where tools answer, the sentinel is an argument of a call, and what closes the call belongs to the answer too.

Whether this holds for a template is tested once, when it is loaded (`Facts`). Where it does not, or where the run wants
the template to rewrite earlier answers (`history=template`), conversations are rendered whole.

Invariants
- What a message says is text: control tokens in it become ordinary tokens (`actors.tokens`).
- A template is rendered in transformers' sandbox; whatever it raises is a `TemplateRefused` of one line.
- The tokenizer's prefix, such as BOS, occurs exactly once.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from actors.gateway.messages import Message, Tool, ToolCall, joined
from actors.tokens import PromptTokens
from services.errors import AnchorageError, ModelUnavailable, first_line

History = Literal["sampled", "template"]

_SENTINEL = f"zqs{secrets.token_hex(8)}qz"
"""Stands for an answer. No text contains it, and templates neither trim nor escape it."""
_ARGUMENT = "value"
_USER = Message("user", "Are you there?")
_SYSTEM = Message("system", "Be brief.")
_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at something.",
        "parameters": {"type": "object", "properties": {_ARGUMENT: {"type": "string"}}, "required": [_ARGUMENT]},
    },
}
_CALL = ToolCall("look", json.dumps({_ARGUMENT: "desk"}), "call_0")
_RESULT = Message("tool", "You see a pen.", tool_call_id="call_0", name="look")
_CALLED = [_USER, Message("assistant", tool_calls=(_CALL,)), _RESULT]


class TemplateRefused(AnchorageError):
    """The chat template cannot write this conversation."""


class HistoryUndecided(AnchorageError):
    """The chat template drops the thoughts of earlier turns, and the configuration does not say what shall hold."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a chat template does, tested when it is loaded.

    Attributes:
        system: it writes system messages.
        tools: it writes the tools.
        tool_messages: it writes calls and what tools answer.
        drops_thoughts: thoughts of earlier turns are left out when they are sent back.
        ends: texts with which an answer may end: after a text, after a call. Empty where nothing ends it.
        call: how it writes a call.
        stub: what follows an answer is the same in a stub as in the whole conversation, so only that is rendered.
    """

    system: bool
    tools: bool
    tool_messages: bool
    drops_thoughts: bool
    ends: tuple[str, ...]
    call: str
    stub: bool

    def lines(self) -> list[str]:
        """For a log and for `status`, one fact a line."""

        def word(told: bool) -> str:
            return "yes" if told else "no"

        return [
            f"system messages: {word(self.system)}",
            f"tools: {word(self.tools)}, their answers: {word(self.tool_messages)}",
            f"drops thoughts of earlier turns: {word(self.drops_thoughts)}",
            f"ends of an answer: {' '.join(self.ends) or 'none'}",
            f"rendered for each call: {'what is new' if self.stub else 'the whole conversation'}",
        ]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered text.

    Attributes:
        text: with control tokens of foreign texts escaped, see `PromptTokens.escape`.
        begun: what the template has begun of the next answer.
    """

    text: str
    begun: str


class Renderer:
    """Renders conversations for one tokenizer.

    Args:
        tokenizer: as transformers loads it.
        template_kwargs: variables of the chat template, such as `enable_thinking`.
        history: `sampled`: the model goes on reading what it wrote. `template`: the chat template rewrites earlier
            answers. None: `sampled`, unless the template drops thoughts.
        history_key: of the configuration, for messages.

    Attributes:
        facts: of the template.
        history: which of the two is in force.
        splices: whether sampled ids stand in prompts for the answers that they are.
        tokens: converts rendered texts to ids.
        tokenizer: as it was given.

    Raises:
        ModelUnavailable: there is no chat template, or it cannot write a user's message; or control tokens cannot be
            told from text.
        HistoryUndecided: see there.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template_kwargs: Mapping[str, object] | None = None,
        history: History | None = None,
        history_key: str = "agent.history",
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens = PromptTokens(tokenizer)
        self._template = _Template(tokenizer, self.tokens, dict(template_kwargs or {}))
        self.facts = _probe(self._template)
        if self.facts.drops_thoughts and history is None:
            name = str(getattr(tokenizer, "name_or_path", "") or "the model")
            raise HistoryUndecided(
                f"the chat template of {name} drops the thoughts of earlier turns: {history_key}=sampled trains with "
                f"them, {history_key}=template as most servers will run it"
            )
        self.history: History = history or "sampled"
        self.splices = self.history == "sampled" and self.facts.stub
        self._segment = functools.lru_cache(maxsize=4096)(self.tokens.encode)
        ends = "|".join(re.escape(end) for end in self.facts.ends)
        self._segments = re.compile(f"(?={ends})") if ends and self._splits(ends) else None

    def whole(self, messages: Sequence[Message], tools: str) -> Rendered:
        """A conversation, up to where the next answer begins.

        Args:
            messages: at least one.
            tools: JSON text of the list of tools; empty if there are none.

        Raises:
            TemplateRefused: see there.
        """
        text = self._template.write(messages, tools)
        return Rendered(text, self._template.begun_after(messages[-1].role))

    def tail(self, opening: Sequence[Message], answer: Message, new: Sequence[Message], tools: str) -> Rendered:
        """What follows an answer, from its end on, up to where the next answer begins.

        Args:
            opening: the conversation up to its first user message.
            answer: that was sampled; only the names of its tool calls are read.
            new: what follows it; may be empty.
            tools: as for `whole`.

        Raises:
            TemplateRefused: see there.
        """
        text = self._template.tail(opening, answer, new, tools)
        return Rendered(text, self._template.begun_after(new[-1].role if new else "assistant"))

    def written(self, answer: Message) -> str:
        """What the chat template writes for an answer, from where a prompt ends to what ends the answer; escaped.

        Raises:
            TemplateRefused: the template cannot write it, or not behind what it begins of an answer.
        """
        begun = self._template.write([_USER], "")
        text = self._template.write([_USER, answer], "", False)
        if not text.startswith(begun):
            raise TemplateRefused("the chat template writes an answer otherwise than it begins one")
        text = text[len(begun) :]
        ends = [text.rfind(end) for end in self.facts.ends]
        return text[: max(ends)] if max(ends, default=-1) >= 0 else text

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a tail."""
        return self.tokens.encode(text)

    def encode_whole(self, text: str) -> list[int]:
        """Ids of a whole conversation, with the tokenizer's prefix.

        Parts between the ends of answers are remembered: of a conversation that is rendered again only what is new is
        encoded.
        """
        if self._segments is None:
            return list(self.tokens.begin(self.tokens.encode(text)))
        ids = [id for part in self._segments.split(text) for id in self._segment(part)]
        prefix = list(self.tokens.prefix)
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def _splits(self, ends: str) -> bool:
        """Whether a text that is encoded in parts, each from an end of an answer on, has the same ids."""
        text = self._template.write([_USER, Message("assistant", " I am. "), _USER], "")
        parts = re.split(f"(?={ends})", text)
        return self.tokens.encode(text) == tuple(id for part in parts for id in self.tokens.encode(part))


class _Template:
    """Writes messages with a chat template.

    Attributes:
        arguments_as_text: the template wants the arguments of calls as JSON text.
        short_ids: the template accepts only ids of calls of nine letters and digits.
        closing: what closes a call behind its last argument. call_end: the token that ends an answer with a call.
    """

    def __init__(self, tokenizer: Any, tokens: PromptTokens, variables: dict[str, object]) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelUnavailable("the model has no chat template; give its folder one that takes tools")
        if not tokens.known:
            raise ModelUnavailable(
                f"the tokenizer {type(tokenizer).__name__} does not say what its control tokens are; use one of "
                "transformers' own"
            )
        self.tokens = tokens
        self.arguments_as_text = self.short_ids = False
        self.closing = self.call_end = ""
        self._tokenizer = tokenizer
        self._variables = variables
        self._begun: dict[str, str] = {}
        self._tools = functools.lru_cache(maxsize=64)(self._escaped_tools)

    def write(self, messages: Sequence[Message], tools: str, begin: bool = True) -> str:
        """The conversation; `begin`: up to where the next answer begins. Raises TemplateRefused."""
        made = [self._made(message) for message in _turns(messages)]
        return self.render(made, self._tools(tools) if tools else None, begin)

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, begin: bool = True) -> str:
        """What the chat template makes of messages in its own form. Raises TemplateRefused."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=begin, tokenize=False, **self._variables
            )
        except Exception as error:  # a template is a program of somebody else's
            raise TemplateRefused(f"the chat template cannot write this conversation: {first_line(error)}") from None
        return text

    def begun_after(self, role: str) -> str:
        """What the template begins of an answer after a message of this role."""
        if role not in self._begun:
            self._begun[role] = self._find_begun(role)
        return self._begun[role]

    def tail(self, opening: Sequence[Message], answer: Message, new: Sequence[Message], tools: str) -> str:
        """See `Renderer.tail`."""
        results = [*itertools.takewhile(lambda message: message.role == "tool", new)]
        for stand_in in _stand_ins(answer, results):
            text = self.write([*opening, stand_in, *new], tools)
            _, found, behind = text.rpartition(_SENTINEL)
            if found:
                return self._from_end(behind, bool(stand_in.tool_calls))
        raise TemplateRefused("the chat template leaves out an answer")

    def _from_end(self, behind: str, is_call: bool) -> str:
        """The text from the end of an answer on, given what follows the sentinel in it."""
        if not is_call:
            start = self.tokens.control_at(behind)
            return behind[max(start, 0) :]
        if self.call_end:
            start = behind.find(self.call_end)
            if start >= 0:
                return behind[start:]
        elif behind.startswith(self.closing):
            return behind[len(self.closing) :]
        raise TemplateRefused("the chat template closes a tool call in an unexpected way")

    def _find_begun(self, role: str) -> str:
        said = Message("assistant", "Yes.")
        asked = {
            "tool": [_USER, replace(said, tool_calls=(_CALL,)), _RESULT],
            "assistant": [_USER, said],
            "system": [_USER, said, _SYSTEM],
        }.get(role, [_USER])
        try:
            before, after = (self.write(asked, "", begin) for begin in (False, True))
        except TemplateRefused:
            return "" if role == "user" else self.begun_after("user")
        return after[len(before) :] if after.startswith(before) else ""

    def _made(self, message: Message) -> dict[str, Any]:
        escape = self.tokens.escape
        made: dict[str, Any] = {"role": message.role, "content": escape(message.content)}
        if message.reasoning:
            made["reasoning_content"] = made["thinking"] = escape(message.reasoning)
        if message.tool_calls:
            made["tool_calls"] = [self._made_call(call) for call in message.tool_calls]
        if message.role == "tool":
            made["tool_call_id"] = self._id(message.tool_call_id)
            if message.name:
                made["name"] = escape(message.name)
        return made

    def _made_call(self, call: ToolCall) -> dict[str, Any]:
        parsed = None if self.arguments_as_text else call.parsed()
        arguments = self.tokens.escape(call.arguments) if parsed is None else _escaped(parsed, self.tokens.escape)
        function = {"name": self.tokens.escape(call.name), "arguments": arguments}
        return {"id": self._id(call.id), "type": "function", "function": function}

    def _id(self, id: str) -> str:
        if not self.short_ids or re.fullmatch("[a-zA-Z0-9]{9}", id):
            return self.tokens.escape(id)
        return hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()[:9]

    def _escaped_tools(self, tools: str) -> list[Any]:
        escaped: list[Any] = _escaped(json.loads(tools), self.tokens.escape)
        return escaped


def _turns(messages: Sequence[Message]) -> list[Message]:
    """The messages, with adjacent assistant messages joined."""
    turns: list[Message] = []
    for message in messages:
        if turns and message.role == turns[-1].role == "assistant" and _SENTINEL not in turns[-1].content:
            turns[-1] = joined([turns[-1], message])
        else:
            turns.append(message)
    return turns


def _escaped(value: Any, escape: Callable[[str], str]) -> Any:
    """A JSON value with all its texts escaped."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {escape(key): _escaped(one, escape) for key, one in value.items()}
    return [_escaped(one, escape) for one in value] if isinstance(value, list) else value


def _stand_ins(answer: Message, results: Sequence[Message]) -> Iterator[Message]:
    """Answers with a sentinel at their end, in the forms in which they may stand before the results of tools.

    Example: before two results the answer is two calls, and the second one's argument is the sentinel; or, for a
    template that writes one call an answer, the one call; or, for one that writes no calls, a text.
    """
    names = [call.name for call in answer.tool_calls] or ["tool"]
    names += names[-1:] * (len(results) - len(names))
    for count in dict.fromkeys(count for count in (len(results), 1) if results):
        calls = [
            ToolCall(name, json.dumps({_ARGUMENT: _SENTINEL if number == count else ""}), result.tool_call_id)
            for number, (name, result) in enumerate(zip(names, results[-count:], strict=False), 1)
        ]
        yield Message("assistant", tool_calls=tuple(calls))
    yield Message("assistant", _SENTINEL)


def _probe(template: _Template) -> Facts:
    """Find out what a chat template does, and set what `template` needs to know of it.

    Raises:
        ModelUnavailable: it cannot write a user's message.
    """
    try:
        text = template.write([_USER], "")
    except TemplateRefused as error:
        raise ModelUnavailable(f"{error}: a single user message") from None
    if _USER.content not in text:  # one for lists of parts writes nothing of a text, and says nothing
        raise ModelUnavailable("the chat template leaves out the text of a user's message")
    tool_messages = _settle_calls(template)
    text_end = _text_end(template)
    if tool_messages:
        _settle_call_end(template)
    tools = json.dumps([_TOOL])
    return Facts(
        system=_writes(template, [_SYSTEM, _USER], "", _SYSTEM.content),
        tools=_writes(template, [_USER], tools, "Look at something."),
        tool_messages=tool_messages,
        drops_thoughts=_drops_thoughts(template),
        ends=tuple(dict.fromkeys(end for end in (text_end, template.call_end) if end)),
        call=template.write(_CALLED, "") if tool_messages else "",
        stub=_stub_is_whole(template, tool_messages),
    )


def _writes(template: _Template, messages: Sequence[Message], tools: str, *texts: str) -> bool:
    """Whether the texts are in the conversation as the template writes it."""
    try:
        written = template.write(messages, tools)
    except TemplateRefused:
        return False
    return all(text in written for text in texts)


def _settle_calls(template: _Template) -> bool:
    """Find a form of calls that the template accepts. Returns whether there is one."""
    python = f"{{'{_ARGUMENT}'"  # a template that expects text writes a mapping as Python does
    for short, as_text in itertools.product((False, True), repeat=2):
        template.short_ids, template.arguments_as_text = short, as_text
        if _writes(template, _CALLED, "", "desk", _RESULT.content) and python not in template.write(_CALLED, ""):
            return True
    template.short_ids = template.arguments_as_text = False
    return False


def _text_end(template: _Template) -> str:
    """The control token that ends an answer without calls; empty if none does."""
    try:
        text = template.write([_USER, Message("assistant", _SENTINEL), _USER], "")
    except TemplateRefused:
        return ""
    behind = text.rpartition(_SENTINEL)[2]
    start = template.tokens.control_at(behind)
    return template.tokens.control(behind[start:]) if start >= 0 else ""


def _settle_call_end(template: _Template) -> None:
    """Find what closes a call, and the token that then ends the answer.

    What closes a call is what a conversation that ends with the call has behind its argument, without what a
    conversation that ends with a text has behind the text.

    Example:            behind a call                           behind a text       closing
        ChatML          "}}\\n</tool_call><|im_end|>\\n         <|im_end|>\\n         "}}\\n</tool_call>
        GLM             </arg_value>\\n</tool_call>                                 </arg_value>\\n</tool_call>
        harmony         "}<|call|>                              <|return|>          "}
    """
    call = replace(_CALL, arguments=json.dumps({_ARGUMENT: _SENTINEL}))
    called = [_USER, Message("assistant", tool_calls=(call,))]
    try:
        behind = template.write(called, "", False).rpartition(_SENTINEL)[2]
        text = template.write([_USER, Message("assistant", _SENTINEL)], "", False).rpartition(_SENTINEL)[2]
        goes_on = template.write([*called, _RESULT], "").rpartition(_SENTINEL)[2]
    except TemplateRefused:
        return
    if behind.endswith(text):
        template.closing = behind.removesuffix(text)
    else:
        template.closing = behind[: max(template.tokens.control_at(behind), 0)]
    if goes_on.startswith(template.closing):
        end = template.tokens.control(goes_on[len(template.closing) :])
        template.call_end = "" if end in template.closing else end


def _drops_thoughts(template: _Template) -> bool:
    """Whether thoughts of an earlier turn are left out that would be written in the latest one, or in another form."""
    thought, said = "zqthoughtqz", "Yes, I am."
    fields = {"role": "assistant", "content": said, "reasoning_content": thought, "thinking": thought}
    inline = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{said}"}
    user = {"role": "user", "content": _USER.content}

    def written(*messages: dict[str, str]) -> str:
        try:
            return template.render([*messages], None, False)
        except TemplateRefused:
            return ""

    if thought in written(user, fields) and thought not in written(user, fields, user):
        return True
    earlier = written(user, inline, user)
    return said in earlier and thought not in earlier


def _stub_is_whole(template: _Template, tool_messages: bool) -> bool:
    """Whether the tail of a stub is that of the whole conversation, in up to five conversations."""
    said = Message("assistant", "Yes.")
    called = Message("assistant", tool_calls=(_CALL,))
    twice = replace(called, tool_calls=(_CALL, replace(_CALL, id="call_1")))
    long = [_SYSTEM, _USER, said, _USER, called, _RESULT, said, _USER]
    tools = json.dumps([_TOOL])
    conversations = [([_USER], said, [_USER], ""), ([_SYSTEM, _USER, said, _USER], said, [_USER], "")]
    if tool_messages:
        second = replace(_RESULT, content="You see a box.", tool_call_id="call_1")
        conversations += [
            ([_USER], called, [_RESULT], tools),
            (long, called, [_RESULT], tools),
            ([_SYSTEM, _USER, called, _RESULT], twice, [_RESULT, second], tools),
        ]
    return all(_same_tail(template, *conversation) for conversation in conversations)


def _same_tail(template: _Template, before: list[Message], answer: Message, new: list[Message], tools: str) -> bool:
    opening = before[: next(n for n, message in enumerate(before, 1) if message.role == "user")]
    try:
        stub = template.tail(opening, answer, new, tools)
        whole = template.tail(before, answer, new, tools)
    except TemplateRefused:
        # What the template cannot write either way, such as a system message or two calls at once, does not count.
        return not _writes(template, [*before, answer, *new], tools)
    return stub == whole and stub.count(template.tokens.escape(new[-1].content)) == 1
