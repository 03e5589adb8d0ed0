"""The plan of a run: what each GPU and the host must hold, how long an update takes, and what does not fit.

Invariants
- A plan starts nothing, loads no weights, and imports neither torch nor Ray nor vLLM.
- A problem is something that cannot work; a warning, something that may end the run or make it slow.
- What lies at the same time on a device is added up; a rank's largest moment is the backward pass of the last layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from anchorage.planning.activations import Attention, Pass
from anchorage.planning.assumptions import Assumptions
from anchorage.planning.engine import Engine, engine_of
from anchorage.planning.host import Host, host_of
from anchorage.planning.shapes import COUNTED, Shape
from anchorage.planning.states import States, number_bytes, states_of, trained_parameters
from anchorage.planning.timing import Timing, timing_of
from services.config.tree import Config
from services.errors import AnchorageError

GIB = 2**30
MARGIN = 1.25
"""A timeout should be at least this many times the longest episode."""


class CardsInvalid(AnchorageError):
    """`--gpus` is not a number of cards and their memory."""


@dataclass(frozen=True, slots=True)
class Cards:
    """The GPUs to plan for.

    Attributes:
        count: number of cards; 0: the run is on CPUs.
        gib: memory of each in GiB.
    """

    count: int
    gib: float

    def __str__(self) -> str:
        return f"{self.count} × {self.gib:g} GiB" if self.count else "no GPU"


def cards_of(text: str) -> Cards:
    """Read `4x80`, or `0` for none. Raises CardsInvalid.

    Example: cards_of("2x24") is Cards(2, 24.0)
    """
    if text == "0":
        return Cards(0, 0.0)
    found = re.fullmatch(r"(\d{1,4})\s*[x×]\s*(\d{1,4}(?:\.\d+)?)", text.strip())
    if found is None or int(found[1]) < 1 or float(found[2]) <= 0:
        raise CardsInvalid(f"--gpus {text}: must be NUMBERxGIB, as in 4x80, or 0 for none")
    return Cards(int(found[1]), float(found[2]))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs. Bytes and seconds.

    Attributes:
        config: of the run.
        shape: of its model.
        cards: GPUs that it is planned for.
        assumed: figures behind it.
        memory: bytes of host memory there are; None: not known.
        rank: bytes of one learner rank, by what they hold.
        engine: one tensor-parallel rank of an engine.
        host: host memory and disk.
        timing: None on CPUs.
    """

    config: Config
    shape: Shape
    cards: Cards
    assumed: Assumptions
    memory: int | None
    rank: Mapping[str, int]
    engine: Engine
    host: Host
    timing: Timing | None

    @property
    def card(self) -> int:
        """Bytes of a card that can be allocated."""
        return int(self.cards.gib * self.assumed.usable * GIB)

    @property
    def rank_total(self) -> int:
        return sum(self.rank.values())

    @property
    def cards_needed(self) -> int:
        """Cards that ranks and actors occupy."""
        ranks, engines = self.config.learner.ranks, self.config.rollout.actors * self.config.rollout.tensor_parallel
        return max(ranks, self.config.rollout.tensor_parallel) if self.config.rollout.share_gpus else ranks + engines

    @property
    def turns(self) -> bool:
        """Whether ranks and engine have the cards one after the other."""
        return self.config.rollout.share_gpus == "turns"

    @property
    def resting(self) -> int:
        """Bytes on a card of a process that waits for its turn."""
        return int(self.assumed.context_gib * GIB)

    @property
    def on_first_card(self) -> int:
        """Bytes on the fullest card where ranks and actors share cards: a rank, and every actor's engine.

        If they take turns, those of the larger of the two, and of the other while it waits.
        """
        if self.turns:
            return max(self.rank_total, self.engine.share) + self.resting
        return self.rank_total + self.config.rollout.actors * self.engine.share

    @property
    def problems(self) -> list[str]:
        """What cannot work, one line each."""
        return [*(self._on_cards() if self.cards.count else ()), *self._on_host()]

    @property
    def warnings(self) -> list[str]:
        """What may go wrong, one line each."""
        return [*self._time(), *self._quality()]

    @property
    def fits(self) -> bool:
        return not self.problems

    def _on_cards(self) -> Iterator[str]:
        config, engine = self.config, self.engine
        if self.cards_needed > self.cards.count:
            yield (
                f"learner.ranks={config.learner.ranks} and rollout.actors={config.rollout.actors} of "
                f"{config.rollout.tensor_parallel} GPU(s) each need {self.cards_needed} GPUs, there are "
                f"{self.cards.count}"
            )
        shared = bool(config.rollout.share_gpus)
        if self.rank_total > self.card:
            yield f"a learner rank needs {gib(self.rank_total)} of a card's {gib(self.card)} GiB"
        elif self.turns and self.on_first_card > self.card:
            whose = "a learner rank" if self.rank_total > engine.share else "an engine"
            yield (
                f"{whose} ({gib(self.on_first_card - self.resting)} GiB) and the other's process while it waits "
                f"({gib(self.resting)}) do not fit a card of {gib(self.card)} GiB"
            )
        elif shared and self.on_first_card > self.card:
            yield (
                f"a learner rank ({gib(self.rank_total)}) and {config.rollout.actors} engine(s) of "
                f"{gib(engine.share)} GiB share a card of {gib(self.card)} GiB"
            )
        if engine.tokens < engine.context:
            yield (
                f"an engine's share of {gib(engine.share)} GiB leaves {gib(engine.cache)} GiB for the KV cache: "
                f"{gib(engine.token * engine.context)} are needed for one episode of {engine.context:,} tokens"
            )

    def _on_host(self) -> Iterator[str]:
        if self.memory is not None and self.host.total > self.memory:
            yield f"the host needs {gib(self.host.total)} GiB of memory, and has {gib(self.memory)}"

    def _time(self) -> Iterator[str]:
        """Timeouts that the longest episode exceeds."""
        if self.timing is None:
            return
        longest, rollout, learner = self.timing.longest, self.config.rollout, self.config.learner
        steps = max(env.max_steps for env in self.config.environments)
        tokens = self.config.model.max_response_tokens
        for key, value in (
            ("rollout.episode_timeout_s", rollout.episode_timeout_s),
            ("learner.group_timeout_s", learner.group_timeout_s),
        ):
            if value < MARGIN * longest:
                yield (
                    f"{key}={value:g}: an episode of {steps} steps of {tokens:,} tokens takes {longest:,.0f} s; "
                    f"set {MARGIN:g} times that"
                )

    def _quality(self) -> Iterator[str]:
        engine, rollout = self.engine, self.config.rollout
        if self.config.learner.zero_stage == 1 and number_bytes(self.config) == 2:
            second = self.config.learner.model_copy(update={"zero_stage": 2})
            less = states_of(self.shape, self.config.model_copy(update={"learner": second}))
            more = states_of(self.shape, self.config).gradients - less.gradients
            yield f"learner.zero_stage=1 takes {gib(more)} GiB more than 2 in bfloat16, which keeps gradients once"
        if self.turns and self.config.learner.max_staleness > 0:
            yield (
                f"learner.max_staleness={self.config.learner.max_staleness}: with rollout.share_gpus=turns nothing is "
                "sampled during an update, and episodes in flight wait for its end; 0 costs nothing"
            )
        if self.cards.count and engine.context <= engine.tokens < engine.context * rollout.episodes_in_flight:
            yield (
                f"the KV cache holds {engine.episodes} episodes of {engine.context:,} tokens, and "
                f"rollout.episodes_in_flight={rollout.episodes_in_flight}: when prompts are long, some wait"
            )
        if self.shape.kind not in COUNTED:
            yield f"activations of {self.shape.kind or 'this model'} are counted like Llama's, which is a guess"

    def record(self) -> dict[str, object]:
        """The plan as plain data: bytes, seconds, and the verdict."""
        engine = self.engine
        return {
            "fits": self.fits,
            "problems": self.problems,
            "warnings": self.warnings,
            "gpus": {"count": self.cards.count, "gib": self.cards.gib, "usable_bytes": self.card},
            "gpus_needed": self.cards_needed if self.cards.count else 0,
            "model": {"kind": self.shape.kind, "parameters": self.shape.parameters},
            "rank": dict(self.rank) | {"total": self.rank_total},
            "engine": {
                "share": engine.share,
                "weights": engine.weights,
                "workspace": engine.workspace,
                "overhead": engine.overhead,
                "kv_cache": engine.cache,
                "kv_cache_tokens": engine.tokens,
                "kv_cache_episodes": engine.episodes,
            },
            "host": {name: getattr(self.host, name) for name in Host.__slots__} | {"total": self.host.total},
            "seconds": None if self.timing is None else {n: getattr(self.timing, n) for n in Timing.__slots__},
            "assumptions": self.assumed.record(),
        }


def make_plan(
    config: Config, shape: Shape, cards: Cards, assumed: Assumptions | None = None, memory: int | None = None
) -> Plan:
    """Plan a run; `memory`: bytes of the host, None: not known."""
    assumed = assumed or Assumptions()
    on_cpu = cards.count == 0
    states = states_of(shape, config)
    rank = _rank(shape, config, states, assumed, on_cpu=on_cpu)
    engine = engine_of(shape, config, assumed, None if on_cpu else int(cards.gib * assumed.usable * GIB))
    host = host_of(shape, config, assumed, states, on_cpu=(sum(rank.values()), engine.share) if on_cpu else None)
    timing = None if on_cpu else timing_of(shape, config, assumed)
    return Plan(config, shape, cards, assumed, memory, rank, engine, host, timing)


def pass_of(shape: Shape, config: Config, assumed: Assumptions, *, on_cpu: bool) -> Pass:
    """The largest forward and backward pass of a rank."""
    model, number = config.model, number_bytes(config)
    context = model.max_prompt_tokens + model.max_response_tokens
    tokens = context if config.learner.packing == "rows" else max(config.learner.microbatch_tokens, context)
    attention: Attention = "each" if on_cpu or number == 4 else "flash"
    return Pass(
        shape=shape,
        number=number,
        tokens=tokens,
        path=int(tokens / (1 - assumed.shared)),
        scored=-(-tokens * model.max_response_tokens // context),
        attention=attention,
        checkpointing=config.learner.activation_checkpointing,
        adapters=0 if model.lora is None else model.lora.rank,
        logits=config.learner.logits_mib * 2**18,
        # Sequences that share a beginning have masks of their own; on average half a context by half a context.
        masks=tokens * context // 4 if attention == "each" and assumed.shared else 0,
    )


def _rank(shape: Shape, config: Config, states: States, assumed: Assumptions, *, on_cpu: bool) -> dict[str, int]:
    """Bytes of one rank at its largest moment, by what they hold."""
    whole = pass_of(shape, config, assumed, on_cpu=on_cpu)
    again = whole.a_layer if whole.checkpointing else 0
    activations = whole.kept + again + whole.backward_of_a_layer
    # On a CPU memory that is allocated and never written takes none: DeepSpeed's bucket.
    bucket = states.bucket if not on_cpu else min(states.bucket, number_bytes(config) * shape.parameters)
    passing = activations + whole.logits_at_once + bucket + states.transient
    scoring = states.reference_alone + whole.logits_at_once + whole.a_layer
    held = max(passing, scoring, states.step)
    published = number_bytes(config) * trained_parameters(shape, config) if config.weights.channel == "ipc" else 0
    overhead = 0 if on_cpu else int(assumed.context_gib * GIB + assumed.fragmentation * passing)
    return {
        "parameters": states.parameters,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "reference": states.reference + max(0, scoring - max(passing, states.step)),
        "activations": activations,
        "logits": whole.logits_at_once,
        "buffers": bucket + states.transient + (max(0, states.step - passing) if held == states.step else 0),
        "overhead": overhead,
        **({"published": published} if published else {}),
    }


def gib(size: int) -> str:
    """Bytes as GiB with one decimal."""
    return f"{size / GIB:,.1f}"
