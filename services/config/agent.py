"""Section of the configuration tree for runs whose episodes are played by an agent program, through the gateway."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from services.config.references import is_reference
from services.config.section import Params, Seconds, Section

READERS = ("auto", "hermes", "xml", "llama3", "text")
LEAST_MEMORY_MIB = 64
RESERVED = ("ANCHORAGE_", "OPENAI_", "ANTHROPIC_", "REDIS_URL", "RAY_")
"""Beginnings of variables that an agent never gets from the actor: the gateway sets them, or they hold secrets."""


def _known_reader(reader: str) -> str:
    if reader in READERS or is_reference(reader):
        return reader
    raise ValueError(
        f"must be one of {', '.join(READERS)}, or a reader of your own as module:Class, got {reader!r:.80}"
    )


def _address(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"must be host:port, such as 127.0.0.1:0, got {address!r:.80}")
    return address


def _variable(name: str) -> str:
    if not name.isidentifier():
        raise ValueError(f"must be the name of an environment variable, got {name!r:.80}")
    if name.startswith(RESERVED):
        raise ValueError(f"{name} is set by the gateway or holds a secret of the run: leave it out")
    return name


class AgentConfig(Section):
    command: tuple[str, ...] | None = Field(None, min_length=1)
    """Program that plays an episode, and its arguments, as in `[python, my_agent.py]`: the actor starts a process for
    each episode. `python` is the interpreter of the run; a path such as `/venv/bin/python` another one. A relative path
    of a file is relative to the recipe. Exactly one of `command` and `service` must be given."""
    service: bool = False
    """Outside services request episodes from the actors (`POST /episodes/next`) instead of a `command`. They need the
    token in `$ANCHORAGE_AGENT_TOKEN`."""
    environment: Literal["bound", "own"] = "bound"
    """`bound`: the episode's environment is a session of the environment server, and the agent acts by
    `POST /episode/step`. `own`: the agent has its own environment, and reports rewards and the end to the gateway."""
    history: Literal["sampled", "template"] | None = None
    """What the model reads of its earlier answers. `sampled`: the tokens that it sampled, thoughts included.
    `template`: what the chat template makes of the messages that the agent sends back. `null`: `sampled` if the
    template keeps thoughts; required if it drops them."""
    reader: Annotated[str, AfterValidator(_known_reader)] = "auto"
    """How tool calls are read from an answer: `hermes`, `xml`, `llama3`, or a reader of your own (`module:Class`).
    `auto`: as the chat template writes them. `text`: not at all, for agents that declare no tools."""
    template_kwargs: Params = Field(default_factory=dict)
    """Variables of the chat template, as in `{enable_thinking: true}`."""
    anchor: Literal["last", "history", "none"] = "last"
    """Anchor of a state with `environment: own`, where the agent gives none. `last`: a digest of the system prompt, the
    tools and the messages since the last answer. `history`: of all messages but answers. `none`: no two states are
    compared."""
    sampling: Literal["impose", "refuse"] = "impose"
    """What happens to the sampling parameters of a request, such as `temperature`. `impose`: the run's are used.
    `refuse`: the request is refused."""
    constraints: Literal["refuse", "ignore"] = "refuse"
    """What happens to requests that constrain the answer (`response_format`, forced tools), which would change the
    distribution that the learner trains. `ignore`: sample without the constraint."""
    on_stop: Literal["truncate", "fail"] = "truncate"
    """What happens to an episode whose agent crashes or exceeds a limit after its first answer. `truncate`: it is
    stored as far as it went. `fail`: it is one failed attempt."""
    max_calls: int = Field(200, ge=1)
    """Maximum number of model calls in an episode."""
    parallel_calls: int = Field(16, ge=1)
    """Maximum number of model calls of one episode at the same time; a further one gets status 429."""
    idle_s: Seconds = 300.0
    """An agent that sends nothing for this many seconds is stopped, as after `rollout.episode_timeout_s`."""
    linger_s: float = Field(30.0, ge=0, le=3600)
    """How long a call continues after its client has disconnected, for the client's retry, in seconds."""
    offer_s: Seconds = 30.0
    """With `service`: an episode that no service takes within this many seconds goes back into the queue."""
    preload: tuple[str, ...] = ()
    """Modules that are imported once, before agent processes are forked, as in `[openai]`. Only for Python programs."""
    pass_environment: tuple[Annotated[str, AfterValidator(_variable)], ...] = ()
    """Names of environment variables that an agent process gets from the actor, beside the fixed ones. All others are
    withheld."""
    memory_mib: int | None = Field(2048, ge=LEAST_MEMORY_MIB)
    """Maximum size of an agent process's data, in MiB (RLIMIT_DATA). `null`: no limit."""
    listen: Annotated[str, AfterValidator(_address)] = "127.0.0.1:0"
    """Address of each actor's gateway. Port 0: any free port. Beyond loopback `$ANCHORAGE_AGENT_TOKEN` must be set."""
    advertise: str | None = Field(None, pattern=r"^https?://[^/\s]+$")
    """URL of the gateway as agents reach it, as in `http://10.0.0.7:8100`. `null`: made of `listen`."""

    @property
    def reader_name(self) -> str:
        """`reader` as the gateway's reader of answers takes it: empty for `text`."""
        return "" if self.reader == "text" else self.reader

    @model_validator(mode="after")
    def _one_kind_of_player(self) -> AgentConfig:
        if self.service == (self.command is not None):
            raise ValueError("give exactly one of command and service")
        if self.command is None and self.preload:
            raise ValueError("preload requires command")
        return self
