"""Prompt templates: built-in ones and plug-ins, with the signatures that they have.

A text template is a function `(goal, history, steps_taken, state) -> str`. It is called for every step with the last
`prompt.history_length` steps, and its text goes through the tokenizer's chat template where there is one. A transcript
is a class with `opening(goal, observation) -> str` and `observation(observation) -> str`: what the prompt begins with,
and what follows each response. Its prompts continue one another, so each token is computed once, and the chat template
is not used. A template of messages is a class with `messages(goal, history, memory, state) -> list[Message]` and
`tools`; the model's chat template writes them (`actors.chat`). Each may take parameters of its own as `params`.

`think` is the GiGPO paper's text template: task, the last observation–action pairs, the observation, the admissible
actions, and the demand for `<think>…</think><action>…</action>`. `compact` is a transcript for small policies: the
episode so far as a terminal would show it; the response is the action alone.

Invariants
- Built-in templates and parsers are loaded as plug-ins are: their names stand for `module:name`.
- A template only makes text. Cutting, control tokens and ids are `actors.prompts`' matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, cast

from actors.gateway.messages import Message, Tool
from actors.parsing import PARSERS, ParsedAction, Parser
from env_servers.protocol import ActionForm, StepResult
from services.config.references import is_reference
from services.config.tree import PromptConfig
from services.plugins import Plugin, PluginError, load, raised

TEMPLATES: Mapping[str, str] = MappingProxyType(
    {"think": "actors.templates:render_think", "compact": "actors.templates:Compact", "chat": "actors.chat:Chat"}
)
"""Names that `prompt.template` may have instead of `module:name`."""

Response = Callable[[str, str], str]
"""From an action, and what the prompt has begun of the response, to a response that takes the action."""

F = TypeVar("F", bound=Callable[..., str])


@dataclass(frozen=True, slots=True)
class Exchange:
    """An earlier step of the episode: what was seen, what was done, and the sampled response in text and tokens.

    For templates of messages also the response as a message, and which actions were admissible.
    """

    observation: str
    action: str
    response: str = ""
    response_ids: Sequence[int] = ()
    answer: Message | None = None
    admissible: Sequence[str] | None = None


History = Sequence[Exchange]
"""Earlier steps of an episode, oldest first."""


class TextTemplate(Protocol):
    """A function from the state of an episode to the text of a prompt."""

    def __call__(self, goal: str | None, history: History, steps_taken: int, state: StepResult) -> str:
        """`history`: the last steps, oldest first; `steps_taken`: how many there were in all."""


class Transcript(Protocol):
    """An episode as one growing text."""

    def opening(self, goal: str | None, observation: str) -> str:
        """What a prompt begins with: the goal, and what is seen first."""

    def observation(self, observation: str) -> str:
        """What follows a response: what came of it."""


class MessageTemplate(Protocol):
    """An episode as messages."""

    tools: Sequence[Tool]
    """What the policy may call; empty: nothing. Where the environment has tools of its own (fact `tools`), those."""

    def messages(self, goal: str | None, history: History, memory: str, state: StepResult) -> list[Message]:
        """The conversation up to the state.

        Args:
            goal: of the episode.
            history: the exchanges to show, oldest first.
            memory: what `prompt.memory` recalls; empty without one.
            state: to act in.
        """


class Memory(Protocol):
    """What is remembered of an episode; each has its own."""

    def observe(self, exchange: Exchange) -> None:
        """Take notice of an exchange, each once, in order."""

    def recall(self, state: StepResult) -> str:
        """What a prompt for this state says of earlier exchanges."""


class ActionReader(Protocol):
    """Makes an action of an answer."""

    def read(self, answer: Message, state: StepResult) -> ParsedAction:
        """The action to take in a state, and whether the answer has the form that the template asks for."""


@dataclass(frozen=True, slots=True)
class Template:
    """A loaded template: a transcript, a template of messages, or a function that renders.

    Attributes:
        label: for messages. transcript, chat: None for a text template.
        response: of the template, see `responding`; None where it does not say.
    """

    label: str
    plugin: Plugin
    transcript: Transcript | None
    response: Response | None
    chat: MessageTemplate | None = None

    def render(self, goal: str | None, history: History, steps_taken: int, state: StepResult) -> str:
        """The text of a text template's prompt. Raises PluginError where the template raises or returns no text."""
        text = self.text(self.plugin.bound(), goal, history, steps_taken, state)
        if not text:
            raise PluginError(f"{self.label}: returned an empty text")
        return text

    def text(self, part: Callable[..., object], *arguments: object) -> str:
        """What a function of the template returns. Raises PluginError where it raises, or returns anything but text."""
        try:
            text = part(*arguments)
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.label}: {raised(error)}") from error
        if not isinstance(text, str):
            raise PluginError(f"{self.label}: must return text, got {type(text).__name__}")
        _require_unicode(self.label, text)
        return text


def responding(response: Response) -> Callable[[F], F]:
    """Tell of a text template what a policy writes to take an action: a warm start needs it, training does not.

    A transcript has a method `response(action, begun)` for it.
    """

    def mark(template: F) -> F:
        template.response = response  # type: ignore[attr-defined]
        return template

    return mark


def load_template(config: PromptConfig) -> Template:
    """The run's template.

    Raises:
        PluginError: see `services.plugins.load`; a class lacks `opening` or `observation`, or cannot be made.
    """
    plugin = load(
        "prompt.template",
        config.template,
        built_in=TEMPLATES,
        arguments=("goal", "history", "steps_taken", "state"),
        of_class=(),
        params=config.params,
        params_key="prompt.params",
    )
    if not inspect.isclass(plugin.target):
        return Template(plugin.label, plugin, None, getattr(plugin.target, "response", None))
    transcript = plugin.call()
    if callable(getattr(transcript, "messages", None)):
        return Template(plugin.label, plugin, None, None, cast(MessageTemplate, transcript))
    for method in ("opening", "observation"):
        if not callable(getattr(transcript, method, None)):
            raise PluginError(f"{plugin.label}: the class has no method {method!r}: it needs opening and observation")
    return Template(plugin.label, plugin, cast(Transcript, transcript), getattr(transcript, "response", None))


def load_parser(config: PromptConfig) -> Parser:
    """The run's parser. It raises PluginError where the plug-in raises, or returns anything but a ParsedAction.

    Raises:
        PluginError: see `services.plugins.load`; there is none.
    """
    if config.parser is None and is_reference(config.template):
        raise PluginError(f"prompt.parser: required with prompt.template={config.template}, which writes a text")
    plugin = load(
        "prompt.parser",
        config.parser or config.template,
        built_in=PARSERS,
        arguments=("response", "admissible", "form"),
        params=config.parser_params,
        params_key="prompt.parser_params",
    )

    def parse(response: str, admissible: Sequence[str] | None, form: ActionForm) -> ParsedAction:
        found = plugin.call(response, admissible, form)
        if not isinstance(found, ParsedAction) or not isinstance(found.action, str):
            raise PluginError(f"{plugin.label}: must return actors.parsing.ParsedAction, got {found!r:.80}")
        if found.action not in response:  # what the policy wrote is the environment's to refuse
            _require_unicode(plugin.label, found.action)
        return found

    return parse


def _require_unicode(label: str, text: str) -> None:
    """Raise PluginError for a text that UTF-8 cannot hold: neither a tokenizer nor JSON can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PluginError(f"{label}: returned a text with half a character: {text[error.start]!r}") from None


def check(config: PromptConfig) -> Iterator[str]:
    """What is wrong with the run's template, parser, memory and reader, one line each: used on small examples."""
    from actors import chat

    try:
        of_messages = load_template(config).chat is not None
    except PluginError:  # the check of the template says so
        of_messages = False
    for key in () if of_messages else ("reader", "memory", "history"):
        if (value := getattr(config, key)) is not None:
            yield f"prompt.{key}={value}: prompt.template={config.template} writes no messages; leave it out"
    for look in (chat.check,) if of_messages else (_check_template, _check_parser):
        try:
            look(config)
        except PluginError as error:
            yield from str(error).splitlines()


def _check_template(config: PromptConfig) -> None:
    template = load_template(config)
    if template.transcript is not None:
        template.text(template.transcript.opening, "find a pen", "You see a desk 1.")
        template.text(template.transcript.opening, None, "")
        template.text(template.transcript.observation, "You see a pen 1.")
        return
    past = [Exchange("You see a desk 1.", "open desk 1", " open desk 1", (1, 2))]
    template.render("find a pen", past, 1, _example_state(1, ["look", "take pen 1"]))
    template.render(None, [], 0, _example_state(0, None))


def _check_parser(config: PromptConfig) -> None:
    parser = load_parser(config)
    for response in ("", " look", "<think>I look.</think><action>look</action>", "look\nlook"):
        for admissible in (None, ["look", "take pen 1"]):
            parser(response, admissible, "as_written")


def _example_state(step: int, admissible: Sequence[str] | None) -> StepResult:
    facts: dict[str, Any] = {"session": "example", "reward": 0.0, "terminated": False, "truncated": False, "anchor": ""}
    return StepResult(step=step, observation="You see a desk 1.", admissible=admissible, **facts)


def _think_response(action: str, begun: str) -> str:
    """One empty thought, unless the prompt has begun or closed it, and the action."""
    thought = "</think>" if begun else "<think></think>"
    return f"{'' if '</think>' in begun else thought}<action>{action}</action>"


@responding(_think_response)
def render_think(goal: str | None, recent: History, steps_taken: int, result: StepResult) -> str:
    """The paper's prompt (arXiv 2505.10978, appendix on prompts)."""
    lines = ["You are an expert agent acting in a text environment."]
    if goal:
        lines.append(f"Your task is to: {goal}")
    if recent:
        lines.append(
            f"Before this step you have taken {steps_taken} step(s). "
            f"The last {len(recent)} observations and the actions you took on them:"
        )
        first = steps_taken - len(recent) + 1
        for number, past in enumerate(recent, start=first):
            lines.append(f"[Observation {number}: '{past.observation}', Action {number}: '{past.action}']")
    lines.append(f"You are now at step {steps_taken + 1} and your current observation is: {result.observation}")
    if result.admissible is not None:
        lines.append("Your admissible actions are: [" + ", ".join(f"'{a}'" for a in result.admissible) + "].")
    lines.append(
        "Now it is your turn to take an action.\n"
        "First reason step by step about the situation, within <think> </think> tags. "
        "Then choose one admissible action and give it within <action> </action> tags."
    )
    return "\n".join(lines)


def render_opening(goal: str | None, observation: str) -> str:
    """How a `compact` prompt begins: the first observation, after the goal where the observation does not state it."""
    told = f"{goal}\n" if goal and goal not in observation else ""
    return f"{told}{_one_line(observation)}\n>"


def render_observation(observation: str) -> str:
    """What a `compact` prompt shows after a response."""
    return f"\n{_one_line(observation)}\n>"


def _one_line(text: str) -> str:
    return " ".join(text.split())


class Compact:
    """The transcript of a terminal."""

    opening = staticmethod(render_opening)
    observation = staticmethod(render_observation)

    def response(self, action: str, begun: str) -> str:
        """The action after one space."""
        return f" {action}"
