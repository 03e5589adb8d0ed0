"""Prompts of messages: the model's own chat template writes system, user, assistant and tool messages.

A template of messages says what the policy reads, a reader of actions what its answer does, a memory what is kept of
what no longer fits. `chat` is the built-in template, `tool` the built-in reader: the policy calls the tool
`act(action)`, or one of the environment's own (fact `tools`), and the next observation is what the tool returns.

Ids, thoughts and tool calls are matters of `actors.gateway`, whose pieces agents use too: sampled ids stand in later
prompts as they were sampled, and what an answer says is read by the model's response template.

Invariants
- A prompt never exceeds `max_prompt_tokens`. Where a conversation gets too long, the older half of the exchanges is
  left out, and stays out, so that the prompts after that extend one another again; their answers are written by the
  chat template then. Then the observation is cut, then ids.
- A memory lives for one episode, and sees each exchange once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from pydantic import BaseModel

from actors.engine.interface import Sample
from actors.gateway.conversation import Conversation
from actors.gateway.conversation import Prompt as Asked
from actors.gateway.messages import Message, Tool, ToolCall
from actors.gateway.read import AnswerReader, Reading
from actors.gateway.render import Renderer, TemplateRefused
from actors.parsing import ParsedAction, judged
from actors.prompts import Prompt, shortened
from actors.templates import ActionReader, Exchange, History, Memory, MessageTemplate, load_template
from env_servers.protocol import ActionForm, StepResult
from services.config.tree import PromptConfig
from services.plugins import Plugin, PluginError, load, raised

READERS: Mapping[str, str] = {"tool": "actors.chat:ToolReader"}
"""Names that `prompt.reader` may have instead of `module:name`."""

ACT: Tool = {
    "type": "function",
    "function": {
        "name": "act",
        "description": "Take an action in the environment; returns what is observed then.",
        "parameters": {
            "type": "object",
            "properties": {"action": {"type": "string", "description": "The action, as text."}},
            "required": ["action"],
        },
    },
}


class ChatParams(BaseModel, extra="forbid"):
    """Parameters of `chat`."""

    system: str = "You act in a text environment. Call the tool act with your next action."
    """System message; empty: none."""
    admissible: bool = True
    """Whether the policy is told which actions are admissible, where the environment says so."""


class Chat:
    """The built-in template of messages: an opening message with the goal, then answers and what came of them."""

    tools: Sequence[Tool] = (ACT,)

    def __init__(self, params: ChatParams) -> None:
        self._params = params

    def messages(self, goal: str | None, history: History, memory: str, state: StepResult) -> list[Message]:
        """See `actors.templates.MessageTemplate`."""
        seen = [(one.observation, one.admissible) for one in history] + [(state.observation, state.admissible)]
        texts = [self._shown(observation, admissible) for observation, admissible in seen]
        told = [f"Your task is to: {goal}"] if goal and goal not in seen[0][0] else []
        messages = [Message("system", self._params.system)] if self._params.system else []
        messages.append(Message("user", "\n".join([*told, *([memory] if memory else []), texts[0]])))
        for number, (past, text) in enumerate(zip(history, texts[1:], strict=True)):
            answer = past.answer or Message("assistant", past.response)
            calls = tuple(
                replace(one, id=f"call{number:03d}{place:02d}") for place, one in enumerate(answer.tool_calls)
            )
            messages.append(replace(answer, tool_calls=calls))
            messages += [Message("tool", text, tool_call_id=one.id, name=one.name) for one in calls]
            if not calls:
                messages.append(Message("user", text))
        return messages

    def answer(self, action: str) -> Message:
        """What a policy without a thought answers to take an action: a warm start needs it, training does not."""
        return Message("assistant", tool_calls=(ToolCall("act", json.dumps({"action": action}, ensure_ascii=False)),))

    def _shown(self, observation: str, admissible: Sequence[str] | None) -> str:
        if admissible is None or not self._params.admissible:
            return observation
        return f"{observation}\nAdmissible actions: {', '.join(admissible)}"


class ToolReader:
    """The built-in reader of actions.

    A call of `act` is its action; a call of another tool, which the environment declared, is the call as JSON. Without
    a call the action is what the answer says, and not valid.

    Example: `act(action="look")` is `look`, `open(door=1)` is `{"name": "open", "arguments": {"door": 1}}`.
    """

    def read(self, answer: Message, state: StepResult) -> ParsedAction:
        """See `actors.templates.ActionReader`."""
        if not answer.tool_calls:
            return ParsedAction(answer.content, False)
        call, is_one = answer.tool_calls[0], len(answer.tool_calls) == 1
        arguments = call.parsed()
        if call.name != "act":
            named = {"name": call.name, "arguments": call.arguments if arguments is None else arguments}
            return ParsedAction(json.dumps(named, ensure_ascii=False), is_one and arguments is not None)
        action = (arguments or {}).get("action")
        is_text = isinstance(action, str)
        return ParsedAction(cast(str, action) if is_text else call.arguments, is_one and is_text)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the configuration names."""

    label: str
    template: MessageTemplate
    reader: ActionReader
    memory: Plugin | None


class ChatPrompts:
    """Prompts of messages for one tokenizer; `begin` makes those of an episode.

    Raises:
        PluginError: the template, the reader or the memory cannot be loaded.
        ModelUnavailable: the model has no chat template, or an unsuitable one.
        HistoryUndecided: its chat template drops thoughts, and `prompt.history` is not set.
    """

    def __init__(self, config: PromptConfig, tokenizer: Any, max_prompt_tokens: int) -> None:
        self.config = config
        self.limit = max_prompt_tokens
        self.parts = _parts(config)
        switches = {} if config.thinking is None else {"enable_thinking": config.thinking}
        self.renderer = Renderer(
            tokenizer, template_kwargs=switches, history=config.history, history_key="prompt.history"
        )
        self.answers = AnswerReader(self.renderer)

    def begin(self) -> ChatEpisode:
        """The prompts of one episode."""
        return ChatEpisode(self)

    def answer(self, action: str) -> Message:
        """What a policy without a thought answers to take an action.

        Raises:
            PluginError: the template does not say.
        """
        make = getattr(self.parts.template, "answer", None)
        if make is None:
            raise PluginError(f"{self.parts.label}: has no answer(action), which a warm start needs")
        return cast(Message, _own(self.parts.label, Message, make, action))

    def response(self, action: str) -> str:
        """That answer as the model writes it, without its end."""
        return self.renderer.tokens.unescape(self.renderer.written(self.answer(action)))

    def response_ids(self, action: str) -> list[int]:
        """Ids of that answer, without its end; what the action says is text."""
        return list(self.renderer.tokens.encode(self.renderer.written(self.answer(action))))


class ChatEpisode:
    """The prompts of one episode. `build` gets the history of the episode, one exchange longer each time."""

    def __init__(self, prompts: ChatPrompts) -> None:
        self._prompts = prompts
        self._parts = prompts.parts
        self._conversation = Conversation(prompts.renderer)
        memory = prompts.parts.memory
        self._memory: Memory | None = None if memory is None else memory.call()
        self._tools: Sequence[Tool] | None = None
        self._taken = self._first = 0
        """How many exchanges were taken in; which is the first one that is shown."""
        self._asked: Asked | None = None
        self._texts: list[str] = []
        self._reading: Reading | None = None

    def begin(self) -> ChatEpisode:
        """As of `ChatPrompts`: the prompts of another episode."""
        return self._prompts.begin()

    def build(self, goal: str | None, history: History, result: StepResult) -> Prompt:
        """The prompt for the state `result`, reached after `history`, on the way to `goal`."""
        self._take_in(history)
        if self._tools is None:
            self._tools = _tools(result, self._parts.template)
        recalled = "" if self._memory is None else _own_text(self._prompts.config.memory, self._memory.recall, result)
        if self._memory is not None:
            self._first = max(self._first, len(history) - self._prompts.config.history_length)

        def ask(first: int, state: StepResult) -> Asked:
            shown = history[first:]
            messages = _own(self._parts.label, list, self._parts.template.messages, goal, shown, recalled, state)
            return self._conversation.ask(messages, self._tools or ())

        try:
            asked, is_cut = self._fitting(ask, len(history), result)
        except TemplateRefused as error:
            raise PluginError(f"{self._parts.label}: {error}") from None
        self._asked = asked
        before = self._texts[asked.extends] if asked.extends >= 0 else ""
        ids = asked.ids.tolist()
        return Prompt(before + asked.text, ids, asked.begun, is_cut or (self._first > 0 and self._memory is None))

    def read(self, prompt: Prompt, sample: Sample, state: StepResult, form: ActionForm) -> ParsedAction:
        """The action of a sampled answer, by the reader and then the run's rules."""
        reading = self._prompts.answers.read(
            prompt.begun, sample.token_ids, finished=sample.finished, tools=self._tools or (), parallel=False
        )
        self._reading = reading
        found = _own(
            self._prompts.config.reader or "tool", ParsedAction, self._parts.reader.read, reading.message, state
        )
        found = replace(found, valid=found.valid and reading.valid)
        judgement = judged(found, state.admissible, self._prompts.config.validity, form)
        return replace(judgement, answer=reading.message)

    def answer(self, action: str) -> Message:
        """See `ChatPrompts.answer`."""
        return self._prompts.answer(action)

    def response(self, action: str) -> str:
        """See `ChatPrompts.response`."""
        return self._prompts.response(action)

    def response_ids(self, action: str) -> list[int]:
        """See `ChatPrompts.response_ids`."""
        return self._prompts.response_ids(action)

    def _take_in(self, history: History) -> None:
        """Remember the answers of exchanges that are new."""
        for exchange in history[self._taken :]:
            if self._asked is not None:
                reading = self._reading or _written(exchange)
                self._conversation.answered(len(self._texts), self._asked, exchange.response_ids, reading)
                before = self._texts[self._asked.extends] if self._asked.extends >= 0 else ""
                self._texts.append(before + self._asked.text + reading.text)
            if self._memory is not None:
                _own(self._prompts.config.memory or "", None, self._memory.observe, exchange)
            self._asked = self._reading = None
        self._taken = len(history)

    def _fitting(self, ask: Callable[[int, StepResult], Asked], count: int, state: StepResult) -> tuple[Asked, bool]:
        """The prompt with as much of the history as fits, then of the observation; and whether that was cut."""
        limit = self._prompts.limit
        asked = ask(self._first, state)
        while len(asked.ids) > limit and self._first < count:
            self._first += (count - self._first + 1) // 2
            asked = ask(self._first, state)
        if len(asked.ids) <= limit:
            return asked, False
        chars = len(state.observation) + sum(map(len, state.admissible or ()))
        while len(asked.ids) > limit and chars > 0:
            chars //= 2
            cut = {"observation": shortened(state.observation, chars), "admissible": None}
            asked = ask(self._first, state.model_copy(update=cut))
        if len(asked.ids) > limit:
            first = limit // 4
            ids = np.concatenate([asked.ids[:first], asked.ids[len(asked.ids) - limit + first :]])
            asked = replace(asked, ids=ids)
        return asked, True


def _written(exchange: Exchange) -> Reading:
    """The reading of an answer that was not sampled but written to be imitated; its last id ends it."""
    message = exchange.answer or Message("assistant", exchange.response)
    return Reading(message, "stop", True, exchange.response, max(len(exchange.response_ids) - 1, 0))


def _tools(state: StepResult, template: MessageTemplate) -> Sequence[Tool]:
    """The environment's own tools, else the template's."""
    told = state.facts.get("tools")
    if isinstance(told, list) and told and all(isinstance(one, Mapping) for one in told):
        return cast(Sequence[Tool], told)
    return tuple(template.tools)


def _parts(config: PromptConfig) -> _Parts:
    """Load what the configuration names. Raises PluginError."""
    template = load_template(config)
    if template.chat is None:
        raise PluginError(f"{template.label}: writes no messages")
    if not isinstance(getattr(template.chat, "tools", None), Sequence):
        raise PluginError(f"{template.label}: the class has no sequence `tools`; () stands for none")
    plugin = load(
        "prompt.reader",
        config.reader or "tool",
        built_in=READERS,
        arguments=(),
        params=config.reader_params,
        params_key="prompt.reader_params",
    )
    reader = plugin.call()
    if not callable(getattr(reader, "read", None)):
        raise PluginError(f"{plugin.label}: the class has no method 'read': it needs read(answer, state)")
    memory = None
    if config.memory is not None:
        memory = load(
            "prompt.memory",
            config.memory,
            built_in={},
            arguments=(),
            params=config.memory_params,
            params_key="prompt.memory_params",
        )
        made = memory.call()
        for method in ("observe", "recall"):
            if not callable(getattr(made, method, None)):
                raise PluginError(f"{memory.label}: the class has no method {method!r}: it needs observe and recall")
    return _Parts(template.label, template.chat, reader, memory)


def _own(label: str, kind: type | None, part: Callable[..., object], *arguments: object) -> Any:
    """What a plug-in returns. Raises PluginError where it raises, or returns another kind of thing."""
    try:
        made = part(*arguments)
    except (Exception, SystemExit) as error:
        raise PluginError(f"{label}: {raised(error)}") from error
    if kind is not None and not isinstance(made, kind):
        raise PluginError(f"{label}: must return {kind.__name__}, got {made!r:.80}")
    if kind is list and not (made and all(isinstance(one, Message) for one in cast(list[object], made))):
        raise PluginError(f"{label}: messages must return at least one Message, and nothing else, got {made!r:.80}")
    return made


def _own_text(label: str | None, part: Callable[..., object], *arguments: object) -> str:
    return cast(str, _own(f"prompt.memory={label}", str, part, *arguments))


def check(config: PromptConfig) -> None:
    """Use template, memory and reader on a small episode. Raises PluginError."""
    parts = _parts(config)
    facts: dict[str, Any] = {"session": "example", "reward": 0.0, "terminated": False, "truncated": False, "anchor": ""}
    first = StepResult(step=0, observation="You see a desk 1.", admissible=None, **facts)
    then = StepResult(step=1, observation="It is open.", admissible=["look", "take pen 1"], **facts)
    answers = (Chat(ChatParams()).answer("open desk 1"), Message("assistant", "open desk 1"))
    for answer in answers:
        past = Exchange(first.observation, "open desk 1", "", (), answer, None)
        recalled = ""
        if parts.memory is not None:
            memory, label = parts.memory.call(), parts.memory.label
            _own(label, str, memory.recall, first)
            _own(label, None, memory.observe, past)
            recalled = _own(label, str, memory.recall, then)
        _own(parts.label, list, parts.template.messages, None, [], "", first)
        _own(parts.label, list, parts.template.messages, "open the desk", [past], recalled, then)
        _own(f"prompt.reader={config.reader or 'tool'}", ParsedAction, parts.reader.read, answer, then)
