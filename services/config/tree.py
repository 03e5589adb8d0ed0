"""The configuration tree of a run: one pydantic model for each section, every field documented, unknown keys invalid.

A recipe in `configs/` is this tree as YAML; `key=value` on the command line overrides single fields (see `load`).
The larger sections are in files of their own; all of them can be imported from here.

A field's docstring is its entry in `docs/configuration.md`: what the key is, its unit, and what a special value means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from services.config.addresses import HttpAddress, RedisAddress
from services.config.agent import AgentConfig as AgentConfig
from services.config.objective import AdvantageConfig as AdvantageConfig
from services.config.objective import LossConfig as LossConfig
from services.config.presets import Algorithm, with_preset
from services.config.references import Choice, is_reference
from services.config.references import PluginsConfig as PluginsConfig
from services.config.section import LARGEST, Params, PlayTemperature, Seconds, Section, Temperature
from services.config.warmstart import WarmstartConfig as WarmstartConfig
from services.config.warmstart import WarmstartPhase as WarmstartPhase
from services.errors import did_you_mean

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of a run's name, which is also the name of a folder and a part of Redis keys."""


class RunConfig(Section):
    name: str = Field("run", pattern=NAME_PATTERN, max_length=120)
    """Run name: its folder below `run.dir` and its namespace in Redis."""
    dir: Path = Path("runs")
    """Folder that holds the runs."""
    seed: int = Field(0, ge=0, le=LARGEST)
    """Random seed of the task order, of sampling in episodes, and of the learner."""
    minutes: float | None = Field(None, gt=0)
    """Time limit of training, in minutes: the run stops after the update that exceeds it. `null`: no limit."""

    @property
    def folder(self) -> Path:
        return self.dir / self.name


class LoraConfig(Section):
    rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = Field(("all-linear",), min_length=1)
    """Linear layers that get an adapter, by the last part of their names. `all-linear`: all linear layers except the
    output head and routed experts."""


class ModelConfig(Section):
    path: Path = Path("models/starter")
    """Local Hugging Face folder with a causal language model and its tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the parameters in the learner and in vLLM."""
    max_prompt_tokens: int = Field(512, ge=8)
    """Maximum prompt length, in tokens. Longer prompts are cut: first the oldest history, then the middle of the
    observation."""
    max_response_tokens: int = Field(24, ge=1)
    """Maximum length of one response, in tokens."""
    lora: LoraConfig | None = None
    """Train low-rank adapters (LoRA) on the frozen model, as in `model.lora.rank=16`. `null`: train all parameters."""


class EnvConfig(Section):
    name: str = Field("alfworld", pattern=r"^[^/\x00-\x1f]+$")
    """Name of the environment, as its server reports it (`/info`)."""
    implementation: Annotated[str, Choice()] | None = None
    """Your own environment class (`module:Class` or `./file.py:Class`), which the run serves itself; its `name` must
    equal `env.name`. `null`: the built-in or registered environment of that name."""
    params: Params = Field(default_factory=dict)
    """Parameters of the environment, for the server that the run starts. Process lists show them, so they must not
    contain secrets."""
    split: str = Field("train", min_length=1)
    """Split that training tasks come from."""
    url: HttpAddress | None = None
    """URL of a running environment server. `null`: the run starts one on loopback and stops it at the end."""
    urls: tuple[HttpAddress, ...] = ()
    """URLs of several servers of the environment, instead of `url`. They share the load; if one fails, its episodes
    restart on the others."""
    weight: float = Field(1.0, gt=0)
    """Share of the groups that this environment gets when there are several (`envs`), relative to the weights of the
    others."""
    engine: Literal["native", "textworld"] = "native"
    """ALFWorld: engine of a server that the run starts. `native`: the built-in one. `textworld`: the official one."""
    data: Path | None = None
    """Folder of the official data. `null`: the folder in `$ALFWORLD_DATA` or `$WEBSHOP_DATA`; without one, tasks are
    generated."""
    tasks: int | None = Field(None, ge=1)
    """Train on the first N tasks of the split only. `null`: on all of them."""
    max_steps: int = Field(50, ge=1)
    """Maximum number of actions in an episode; it is truncated after them."""
    anchor: Literal["observation", "state"] = "observation"
    """What identifies the state of a step when steps are grouped. `observation`: the observation's text (as published).
    `state`: a digest of the exact state."""
    action_form: Literal["as_written", "one_line", "lower_case"] | None = None
    """How an action is normalised before it is sent. `as_written`: not at all. `one_line`: white space is removed at
    both ends and reduced to single spaces elsewhere. `lower_case`: the same, in lower case. `null`: as the environment
    requests (`/info`)."""
    won_at: float | None = None
    """For environments that do not report `won`: an episode is won if it terminates with a last reward of at least
    this, in the environment's units. `null`: with a last reward above 0."""
    success_reward: float = Field(10.0, gt=0, le=1e6)
    """Factor on the environment's reward. The published value is 10, so that a success is worth 10."""
    request_timeout_s: Seconds = 30.0
    """Timeout of one HTTP request to the server, in seconds."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """URLs of running servers; empty if the run starts one."""
        return self.urls or ((self.url,) if self.url is not None else ())

    @model_validator(mode="after")
    def _one_kind_of_address(self) -> EnvConfig:
        if self.url is not None and self.urls:
            raise ValueError("give url or urls, not both")
        return self

    @model_validator(mode="after")
    def _params_are_for_a_server_of_the_run(self) -> EnvConfig:
        if self.params and self.addresses:
            raise ValueError(
                "params cannot be given with url or urls: a running server has its own (anchorage env serve --params)"
            )
        return self


Template = Annotated[str, Choice(("think", "compact", "chat"))]
Parser = Annotated[str, Choice(("think", "compact"))]
Memory = Annotated[str, Choice()]
ActionReader = Annotated[str, Choice(("tool",))]


class PromptConfig(Section):
    template: Template = "think"
    """`think`: the published prompt, whose response is `<think>…</think><action>…</action>`. `compact`: for small
    policies, whose response is the action only. `chat`: the model's own chat template, with tool calls. Or a plug-in
    (`module:name`, `./file.py:name`)."""
    parser: Parser | None = None
    """Parser that extracts the action from a response: `think`, `compact` or a plug-in. `null`: the parser with the
    template's name."""
    params: Params = Field(default_factory=dict)
    """Parameters of a template: of a plug-in, or `system` and `admissible` of `chat`."""
    parser_params: Params = Field(default_factory=dict)
    """Parameters of a parser that is a plug-in."""
    reader: ActionReader | None = None
    """Templates of messages: what makes an action of an answer, instead of a parser. `tool`: the call of the tool
    `act`, or of a tool of the environment. Or a plug-in. `null`: `tool`."""
    reader_params: Params = Field(default_factory=dict)
    """Parameters of a reader that is a plug-in."""
    memory: Memory | None = None
    """Templates of messages: a plug-in that recalls what happened earlier. With one, a prompt holds the last
    `history_length` exchanges; without one as many as fit."""
    memory_params: Params = Field(default_factory=dict)
    """Parameters of the memory."""
    history: Literal["sampled", "template"] | None = None
    """Templates of messages: what the model reads of its earlier answers. `sampled`: what it wrote. `template`: what
    the chat template leaves of it. `null`: `sampled`, but invalid if the chat template drops thoughts."""
    history_length: int = Field(2, ge=0)
    """Number of earlier observation–action pairs in a `think` prompt. A `compact` prompt holds as many as fit."""
    thinking: bool | None = None
    """`enable_thinking` of the chat template, for models with that switch (Qwen3). `null`: the template's default."""
    validity: Literal["admissible", "well_formed"] = "admissible"
    """Which responses are valid. `well_formed`: those in the template's format. `admissible`: those whose action is
    also admissible."""

    @model_validator(mode="after")
    def _answers_can_be_read(self) -> PromptConfig:
        if self.parser is None and self.reader is None and is_reference(self.template):
            raise ValueError(
                f"prompt.parser: required with prompt.template={self.template}; set think, compact or your own parser; "
                "for a template of messages set prompt.reader=tool or your own reader"
            )
        if self.template in ("think", "compact") and (wrong := self.reader or self.memory or self.history):
            raise ValueError(
                f"{wrong}: prompt.reader, prompt.memory and prompt.history are for templates of messages, such as "
                f"chat, got prompt.template={self.template}"
            )
        if self.template == "chat" and self.parser is not None:
            raise ValueError(
                f"prompt.parser={self.parser}: prompt.template=chat has answers with tool calls; set prompt.reader"
            )
        return self


class RolloutConfig(Section):
    actors: int = Field(1, ge=1)
    """Number of rollout actors in the run's own Ray cluster, until `anchorage pool scale` changes it. In an existing
    cluster: one actor for each `rollout` resource."""
    episodes_in_flight: int = Field(64, ge=1)
    """Number of episodes that one actor plays at the same time."""
    temperature: Temperature = 1.0
    """Sampling temperature in training."""
    lease_s: Seconds = 30.0
    """Lease of a ticket, in seconds. A ticket that is not renewed in time goes to another actor."""
    max_attempts: int = Field(3, ge=1)
    """Number of failed attempts after which a ticket is given up; `partial_groups` decides about its group."""
    partial_groups: Literal["replace", "keep"] = "replace"
    """What happens to a group with a failed ticket. `replace`: it is cancelled, and the next group takes its place.
    `keep`: it continues without that member while at least two are left, which biases training towards tasks and
    episodes that do not fail."""
    episode_timeout_s: Seconds = 600.0
    """Timeout of an episode, in seconds. An episode that exceeds it is one failed attempt."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """vLLM on GPUs: share of the GPU's memory. On CPUs `kv_cache_mib` applies instead."""
    kv_cache_mib: int = Field(256, ge=16)
    """vLLM on CPUs: size of the KV cache, in MiB."""
    tensor_parallel: int = Field(1, ge=1)
    """vLLM: number of tensor-parallel ranks of one engine. On GPUs each rank takes one GPU."""
    engine: Params = Field(default_factory=dict)
    """Further arguments of vLLM's engine by the names of its `EngineArgs`, as in `rollout.engine.kv_cache_dtype=fp8` or
    `rollout.engine.max_num_batched_tokens=16384`. Those that other keys set are invalid here."""
    share_gpus: Literal[False, True, "turns"] = False
    """Request no GPUs from Ray: actors see every GPU of their node and share them with the learner, which is necessary
    with only one GPU. `true`: at the same time; lower `gpu_memory_utilization` to leave memory for the learner.
    `turns`: one after the other, each with the whole GPU, for models that leave no room for both."""

    @property
    def fewest_members(self) -> int:
        """Minimum number of members of a group; below it the group is cancelled. 0: every member is required."""
        return 2 if self.partial_groups == "keep" else 0


Beta = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moment. It is below 1, since AdamW divides by 1 minus its power."""


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0, le=1)
    """Peak learning rate of AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = Field(0.0, ge=0, le=100)
    """Weight decay of AdamW."""
    warmup_updates: int = Field(0, ge=0)
    """Number of updates in which the learning rate rises linearly to its peak. 0: no warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up. `constant`: stays at its peak. `linear`, `cosine`: falls to a tenth of it over
    `learner.updates`."""
    grad_clip: float = Field(1.0, gt=0)
    """Maximum norm of the gradient; a larger gradient is scaled down to it."""


class LearnerConfig(Section):
    ranks: int = Field(1, ge=1)
    """Number of data-parallel DeepSpeed ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage. bfloat16 requires 1 or more, since ZeRO's optimizer keeps the float32 copies of the
    parameters."""
    offload_optimizer: bool = False
    """Keep the optimizer state on the CPU and run the optimizer step there (ZeRO stages 1 to 3)."""
    offload_parameters: bool = False
    """Keep parameters on the CPU until a layer needs them (ZeRO stage 3)."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and recompute the layer in the backward pass: less memory, a third more compute."""
    reference: Literal["resident", "offloaded", "sharded"] = "resident"
    """Where the reference policy is kept between uses, if `loss.kl_coef` > 0. `resident`: on each rank's device.
    `offloaded`: in CPU memory. `sharded`: sharded over the ranks (ZeRO stage 3). With LoRA it is the model without its
    adapters and takes no memory."""
    updates: int = Field(100, ge=1)
    """Number of policy updates of the run."""
    groups_per_update: int = Field(16, ge=1)
    """Number of complete groups in one update."""
    group_size: int = Field(8, ge=2)
    """Number of episodes in a group. At least 2, since advantages are relative to the group."""
    dynamic_sampling: bool = False
    """Drop groups whose episodes all have the same reward, and play further groups instead (DAPO)."""
    dynamic_sampling_limit: int = Field(10, ge=1)
    """Stop with an error if more than this many times `groups_per_update` groups are dropped for one update."""
    max_staleness: int = Field(1, ge=0)
    """Maximum age of the policy that a group was played with, in updates. 0: synchronous, on-policy."""
    minibatches: int = Field(1, ge=1)
    """Number of optimizer steps that an update's rows are split into. The policy version counts updates, not steps."""
    microbatch_tokens: int = Field(8192, ge=64)
    """Maximum number of tokens in one forward pass."""
    packing: Literal["auto", "packed", "rows"] = "auto"
    """`packed`: many rows in one forward pass, with shared prefixes computed once. `rows`: each row in a forward pass
    of the model's own. `auto`: `packed` if a check at the start finds that it computes the same function, else
    `rows`."""
    logits_mib: int = Field(256, ge=1)
    """Maximum memory for float32 logits, in MiB. More logits are computed in pieces, and again in the backward pass."""
    threads: int = Field(1, ge=1)
    """Number of CPU threads of a rank (CPU backend only)."""
    max_logprob_gap: float | None = Field(0.2, gt=0, allow_inf_nan=False)
    """Stop with an error if sampler and learner differ by more than this many nats in three consecutive updates. The
    difference is the mean |log π − log μ| over the tokens that the version being updated sampled, or over all tokens if
    five updates had none of those. With the same weights it is about 1e-5 in float32, 0.01 in bfloat16, and up to 0.1
    for mixtures of experts, whose routers may decide differently; wrong weights give more. `null`: no limit."""
    group_timeout_s: Seconds = 900.0
    """Stop with an error if no group completes for this many seconds."""
    max_restarts: int = Field(3, ge=0)
    """Maximum number of restarts of the learner's ranks from the last checkpoint within one run."""


class CheckpointConfig(Section):
    every: int = Field(10, ge=1)
    """Number of updates between checkpoints. Groups are acknowledged only after the checkpoint that records them."""
    keep: int = Field(2, ge=2)
    """Number of checkpoints to keep, the newest ones. At least 2: a run survives one damaged checkpoint."""
    keep_best: bool = True
    """Also keep the policy that did best in the panels of `evaluation.every`, as a Hugging Face folder."""


class EvaluationConfig(Section):
    split: str | tuple[str, ...] | None = None
    """Split of the evaluation panels, or a list such as `[valid_seen, valid_unseen]`: each split has its own panels and
    figures, and success over all of them selects the best policy. `null`: the first that exists of `valid_unseen`,
    `valid_seen`, `test`."""
    episodes: int = Field(128, ge=1)
    """Number of tasks in a panel, from the first of the split on. A single panel is the whole split if the split is
    smaller."""
    panels: int = Field(1, ge=1)
    """Number of panels. Each takes the tasks that follow those of the previous panel: no task is in two of them."""
    seeds: int = Field(1, ge=1)
    """Number of episodes for each task, each with its own sampling seed. Intervals are over tasks, whatever this number
    is."""
    temperature: PlayTemperature = 0.4
    """Sampling temperature in evaluation; 0: always the most likely token. The published value is 0.4."""
    every: int | None = Field(None, ge=1)
    """Play the panels before training and after every N updates; the learner waits meanwhile. `null`: never."""

    @field_validator("split", mode="before")
    @classmethod
    def _names_splits(cls, value: object) -> object:
        if value is None:
            return value
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) for n in names):
            raise ValueError("must be a split name or a list of split names")
        if value == "":
            raise PydanticCustomError("string_too_short", "must not be empty")
        if "" in names:
            raise ValueError("must not contain an empty name")
        return value

    @property
    def most_episodes(self) -> int:
        """Maximum number of episodes of all panels; a single panel larger than its split has fewer."""
        return self.episodes * self.panels * self.seeds * max(1, len(self.splits))

    @property
    def splits(self) -> tuple[str, ...]:
        """The configured splits, each once."""
        return (self.split,) if isinstance(self.split, str) else tuple(dict.fromkeys(self.split or ()))


LONGEST_LEASE_S = 86_400.0
"""Maximum lease of an owner, in seconds. No run writes a longer one to Redis, and nobody would wait for its end."""


class BufferConfig(Section):
    redis_url: RedisAddress | None = None
    """URL of the Redis to use. `null`: `$REDIS_URL`; if that is not set, the run starts its own redis-server with its
    data in the run's folder."""
    timeout_s: Seconds = 10.0
    """Timeout of one Redis command, in seconds."""
    reconnect_s: Seconds = 60.0
    """How long to retry before a lost Redis connection is an error, in seconds."""
    max_mib: int = Field(2048, ge=1)
    """Maximum size of the stored trajectories, in MiB. Actors wait while it is reached."""
    owner_lease_s: float = Field(30.0, gt=0, le=LONGEST_LEASE_S)
    """Lease on the run's name, in seconds. If the run's process does not renew it in time, another process may take the
    name."""


COLLECTIVE = ("nccl", "gloo", "ipc")
"""Weight channels that send a version to all actors at once."""


class WeightsConfig(Section):
    channel: Literal["ray", "directory", "nccl", "gloo", "ipc"] = "ray"
    """How weights reach the actors. `ray`: shared memory on the learner's node, the object store between nodes.
    `directory`: safetensors in a folder that all processes can read. `nccl`: vLLM's weight transfer, from the GPU of
    learner rank 0 to the actors' GPUs, which must be others. `gloo`: the same way of sending, for engines on CPUs.
    `ipc`: engines map a copy of the weights that rank 0 keeps on the card that they share (`rollout.share_gpus`)."""
    directory: Path | None = None
    """Folder of the `directory` channel. `null`: `weights` in the run's folder."""
    update: Literal["in_flight", "at_step", "at_episode"] = "in_flight"
    """When an actor loads a new version. `in_flight`: immediately, with its requests kept. `at_step`: between steps.
    `at_episode`: between episodes."""
    timeout_s: Seconds = 120.0
    """Timeout of one transfer, in seconds."""


TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
EARLIER_KEYS = ("tensorboard", "wandb", "wandb_project")


class TelemetryConfig(Section):
    trackers: tuple[Annotated[str, Choice(TRACKERS)], ...] = ("tensorboard",)
    """Where metrics go besides `metrics.jsonl`: `tensorboard` (event files in the run's folder), `wandb`, `mlflow`,
    `trackio`, or plug-ins (`module:name`, `./file.py:name`)."""
    params: dict[str, Params] = Field(default_factory=dict)
    """Parameters of trackers, by tracker name, as in `telemetry.params.wandb.mode=offline`. For a plug-in, use the name
    after its colon."""
    keep_groups_mib: int = Field(512, ge=0)
    """Maximum size of the groups kept in the run's folder for the dashboard, in MiB; the oldest are deleted first. 0:
    keep none."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level of the log messages that Anchorage writes."""

    def params_key(self, tracker: str) -> str:
        """The key in `params` for one of `trackers`."""
        return tracker.rpartition(":")[2]

    @model_validator(mode="before")
    @classmethod
    def _earlier_keys(cls, tree: object) -> object:
        """Convert the keys of older recipes: `tensorboard: false`, `wandb: offline`, `wandb_project: name`."""
        if not isinstance(tree, Mapping) or not tree.keys() & EARLIER_KEYS:
            return tree
        rest = {key: value for key, value in tree.items() if key not in EARLIER_KEYS}
        trackers, params = [*rest.get("trackers", ("tensorboard",))], {**rest.get("params", {})}
        mode = tree.get("wandb", "off")
        if mode not in ("off", "online", "offline"):
            raise ValueError(f"telemetry.wandb: must be one of off, offline, online, got {mode!r:.80}")
        if tree.get("tensorboard") is False:
            trackers = [tracker for tracker in trackers if tracker != "tensorboard"]
        if mode != "off":
            trackers.append("wandb")
            project = {"project": tree["wandb_project"]} if "wandb_project" in tree else {}
            params["wandb"] = {"mode": mode, **project, **params.get("wandb", {})}
        return {**rest, "trackers": trackers, "params": params}

    @model_validator(mode="after")
    def _parameters_have_a_tracker(self) -> TelemetryConfig:
        known = {*TRACKERS, *map(self.params_key, self.trackers)}
        lines = [
            f"telemetry.params.{name}: no such tracker in telemetry.trackers{did_you_mean(name, known)}"
            for name in self.params
            if name not in known
        ]
        if lines:
            raise ValueError("\n".join(lines))
        return self


class Config(Section):
    """Configuration of a run."""

    algorithm: Algorithm = "gigpo"
    """Advantage estimator. It also sets the defaults of other keys as in its paper; values given explicitly take
    precedence. A plug-in (`module:name`, `./file.py:name`) is an estimator of your own and sets no defaults."""
    plugins: PluginsConfig = PluginsConfig()
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    envs: tuple[EnvConfig, ...] = ()
    """Several environments in one run, instead of `env`. Groups are divided among them in proportion to their
    weights."""
    prompt: PromptConfig = PromptConfig()
    agent: AgentConfig | None = None
    """Let an agent program play the episodes, through an OpenAI-compatible gateway ([agents.md](agents.md)). `null`:
    the run's own prompt template does."""
    rollout: RolloutConfig = RolloutConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    buffer: BufferConfig = BufferConfig()
    weights: WeightsConfig = WeightsConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    warmstart: WarmstartConfig = WarmstartConfig()

    @model_validator(mode="before")
    @classmethod
    def _algorithm_sets_defaults(cls, tree: object) -> object:
        return with_preset(tree) if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _engine_can_do_it(self) -> Config:
        if problems := [*self.conflicts()]:
            raise ValueError("\n".join(problems))
        return self

    def conflicts(self) -> Iterator[str]:
        """Yield a line for each combination of values that no run can have; none, unless `model_copy` made this."""
        learner = self.learner
        if learner.zero_stage == 0 and self.model.dtype == "bfloat16":
            yield "learner.zero_stage: must be >= 1 with model.dtype=bfloat16, got 0"
        if learner.zero_stage == 0 and learner.offload_optimizer:
            yield "learner.offload_optimizer: requires learner.zero_stage >= 1, got 0"
        if learner.zero_stage < 3 and learner.offload_parameters:
            yield f"learner.offload_parameters: requires learner.zero_stage=3, got {learner.zero_stage}"
        if self.weights.channel == "nccl" and self.rollout.share_gpus is True:
            yield "weights.channel: nccl cannot connect a card to itself (rollout.share_gpus); use ray or ipc"
        if self.weights.channel == "ipc" and self.rollout.share_gpus is False:
            yield "weights.channel: ipc requires rollout.share_gpus; use nccl or ray"
        if self.weights.channel == "ipc" and max(self.learner.ranks, self.rollout.tensor_parallel) > 1:
            yield "weights.channel: ipc requires learner.ranks=1 and rollout.tensor_parallel=1; use ray"
        if self.rollout.share_gpus == "turns":
            yield from self._conflicts_of_turns()

    def _conflicts_of_turns(self) -> Iterator[str]:
        learner, sharded = self.learner, self.learner.reference == "sharded"
        if learner.zero_stage < 2:
            yield f"learner.zero_stage: must be 2 or 3 with rollout.share_gpus=turns, got {learner.zero_stage}"
        if learner.offload_parameters:
            yield "learner.offload_parameters: must be false with rollout.share_gpus=turns, got true"
        if sharded and self.loss.kl_coef > 0 and self.model.lora is None:
            yield "learner.reference: must be resident or offloaded with rollout.share_gpus=turns, got sharded"
        if self.rollout.actors > 1:
            yield (
                f"rollout.actors: must be 1 with rollout.share_gpus=turns, got {self.rollout.actors}; for an engine on "
                "several GPUs set rollout.tensor_parallel"
            )
        if self.weights.channel in COLLECTIVE:
            channel = self.weights.channel
            yield f"weights.channel: must be ray or directory with rollout.share_gpus=turns, got {channel}"

    @property
    def environments(self) -> tuple[EnvConfig, ...]:
        """The environments of the run: `envs`, or `env` alone."""
        return self.envs or (self.env,)

    def environment(self, name: str) -> EnvConfig:
        """The settings of the environment called `name`; those of `env` if `envs` does not list it."""
        return next((env for env in self.envs if env.name == name), self.env)

    @model_validator(mode="after")
    def _environments_are_distinct(self) -> Config:
        names = [env.name for env in self.envs]
        if len(set(names)) < len(names):
            raise ValueError("envs: names must be unique")
        total = sum(env.weight for env in self.envs)
        if any(env.weight < total / 100 for env in self.envs):
            raise ValueError("envs: each weight must be at least 1 % of their sum")
        return self
