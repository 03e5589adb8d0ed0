"""The configuration tree of a run: one pydantic model a section, every field documented, unknown keys refused.

A recipe in `configs/` is this tree as YAML; `key=value` on the command line overrides single fields (see `load`).
The larger sections lie in files of their own; all of them can be imported from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from services.config.addresses import HttpAddress, RedisAddress
from services.config.objective import AdvantageConfig as AdvantageConfig
from services.config.objective import LossConfig as LossConfig
from services.config.presets import Algorithm, with_preset
from services.config.references import Choice, is_reference
from services.config.references import PluginsConfig as PluginsConfig
from services.config.section import LARGEST, Params, Seconds, Section, Temperature
from services.config.warmstart import WarmstartConfig as WarmstartConfig
from services.config.warmstart import WarmstartPhase as WarmstartPhase
from services.errors import did_you_mean

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Of a run's name, which is that of a folder and a part of Redis keys."""


class RunConfig(Section):
    name: str = Field("run", pattern=NAME_PATTERN, max_length=120)
    """Name of the run: its folder below `dir`, and its name space in Redis."""
    dir: Path = Path("runs")
    """Folder that holds the runs."""
    seed: int = Field(0, ge=0, le=LARGEST)
    """Seed of the task order, of the episodes' sampling and of the learner."""
    minutes: float | None = Field(None, gt=0)
    """Stop after the update that passes this many minutes of training; none: no limit."""

    @property
    def folder(self) -> Path:
        return self.dir / self.name


class LoraConfig(Section):
    rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """Adapters are added times alpha / rank."""
    targets: tuple[str, ...] = Field(("all-linear",), min_length=1)
    """Linear layers that get one, by the end of their names; `all-linear`: all but the head and routed experts."""


class ModelConfig(Section):
    path: Path = Path("models/starter")
    """Local Hugging Face folder of a causal language model with its tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter type in the learner and in vLLM."""
    max_prompt_tokens: int = Field(512, ge=8)
    """Prompts longer than this are cut: oldest history first, then the middle of the observation."""
    max_response_tokens: int = Field(24, ge=1)
    """Sampling limit of one response."""
    lora: LoraConfig | None = None
    """Train low-rank adapters (LoRA) of a frozen model, as in `model.lora.rank=16`; none: the whole model."""


class EnvConfig(Section):
    name: str = Field("alfworld", pattern=r"^[^/\x00-\x1f]+$")
    """Name of the environment, as its server's info route gives it."""
    implementation: Annotated[str, Choice()] | None = None
    """Class of an environment of your own, which a server is started for here (`module:Class`, `./file.py:Class`); its
    `name` must be `env.name`. none: the one of that name that comes with the project or was registered."""
    params: Params = Field(default_factory=dict)
    """Parameters of the environment, for the server that the run starts. Process lists show them, so they must not
    contain secrets."""
    split: str = Field("train", min_length=1)
    """Split that training tasks come from."""
    url: HttpAddress | None = None
    """Address of a running server; none: `train` starts one on loopback for the length of the run."""
    urls: tuple[HttpAddress, ...] = ()
    """Addresses of several servers of the environment, in place of `url`: they share the load, and when one dies
    its episodes begin again on the others."""
    weight: float = Field(1.0, gt=0)
    """Share of the groups among several environments (`envs`), relative to the others' weights."""
    engine: Literal["native", "textworld"] = "native"
    """ALFWorld: which engine a server started here uses."""
    data: Path | None = None
    """Folder of the official data; none: `ALFWORLD_DATA` or `WEBSHOP_DATA`, else generated tasks."""
    tasks: int | None = Field(None, ge=1)
    """Use only the first so many tasks of the training split; none: all."""
    max_steps: int = Field(50, ge=1)
    """Actions after which an episode is truncated."""
    anchor: Literal["observation", "state"] = "observation"
    """Anchor of a step: the observation's text (as published), or a digest of the exact state."""
    action_form: Literal["as_written", "one_line", "lower_case"] | None = None
    """What is done to an action before it is sent: nothing, or white space dropped at both ends and one space
    elsewhere, or that in lower case; none: what the environment asks for (`/info`)."""
    won_at: float | None = None
    """Where the environment does not tell `won`: an episode is won when it terminated with a last reward of at least
    this, in the environment's units; none: with a last reward above 0."""
    success_reward: float = Field(10.0, gt=0, le=1e6)
    """Factor on the environment's reward (10 for success, as published)."""
    request_timeout_s: Seconds = 30.0
    """Time limit of one HTTP request to the server."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of running servers; none: one is started here."""
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


Template = Annotated[str, Choice(("think", "compact"))]


class PromptConfig(Section):
    template: Template = "think"
    """`think`: the paper's prompt, `<think>…</think><action>…</action>`. `compact`: small policies, the action only.
    Or a plug-in (`module:name`, `./file.py:name`)."""
    parser: Template | None = None
    """What makes an action of a response: `think`, `compact` or a plug-in; none: the one of the template's name."""
    params: Params = Field(default_factory=dict)
    """Parameters of a template that is a plug-in."""
    parser_params: Params = Field(default_factory=dict)
    """Parameters of a parser that is a plug-in."""
    history_length: int = Field(2, ge=0)
    """Earlier observation–action pairs shown in a `think` prompt; a `compact` one shows what fits."""
    thinking: bool | None = None
    """`enable_thinking` of the chat template, for models with that switch (Qwen3); none: the template's default."""
    validity: Literal["admissible", "well_formed"] = "admissible"
    """When a response counts as valid: well-formed, and by default also an admissible action."""

    @model_validator(mode="after")
    def _parser_is_known(self) -> PromptConfig:
        if self.parser is None and is_reference(self.template):
            raise ValueError(
                f"prompt.parser: is needed with prompt.template={self.template}: think, compact or a parser of your own"
            )
        return self


class RolloutConfig(Section):
    actors: int = Field(1, ge=1)
    """Rollout actors in a Ray cluster of the run's own, until `anchorage pool scale` wishes for others. In a cluster
    that was there before: one for each `rollout` resource."""
    episodes_in_flight: int = Field(64, ge=1)
    """Episodes one actor plays at the same time."""
    temperature: Temperature = 1.0
    """Sampling temperature in training."""
    lease_s: Seconds = 30.0
    """A ticket not renewed for this long goes to another actor."""
    max_attempts: int = Field(3, ge=1)
    """A ticket that failed this often ends its group, see `partial_groups`."""
    partial_groups: Literal["replace", "keep"] = "replace"
    """What becomes of such a group: it is cancelled and the next one takes its place, or it goes on without the member,
    as long as two are left. Kept groups lean towards tasks and episodes that do not fail."""
    episode_timeout_s: Seconds = 600.0
    """An episode that takes longer is given up (one failed attempt)."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """vLLM: share of the GPU's memory. Without a GPU see `kv_cache_mib`."""
    kv_cache_mib: int = Field(256, ge=16)
    """vLLM on CPU: size of the KV cache in MiB."""
    tensor_parallel: int = Field(1, ge=1)
    """vLLM: tensor-parallel ranks of one engine, on GPUs each on one of its own."""
    share_gpus: bool = False
    """Ask Ray for no GPUs: the actors see all of their node and share them with the learner, as they must where there
    is one only. Leave memory for it then (`gpu_memory_utilization`)."""

    @property
    def fewest_members(self) -> int:
        """Members below which a group is cancelled; 0: it has to be whole."""
        return 2 if self.partial_groups == "keep" else 0


Beta = Annotated[float, Field(ge=0, lt=1)]
"""At 1 AdamW would divide by 0."""


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0, le=1)
    """Peak learning rate of AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = Field(0.0, ge=0, le=100)
    warmup_updates: int = Field(0, ge=0)
    """Linear warm-up of the learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stays, or falls to a tenth over `learner.updates`."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""


class LearnerConfig(Section):
    ranks: int = Field(1, ge=1)
    """Data-parallel DeepSpeed ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage. bfloat16 needs 1 or more: ZeRO's optimizer keeps the float32 copies of the parameters."""
    offload_optimizer: bool = False
    """Keep optimizer state, and the optimizer step, on the CPU (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """Keep parameters on the CPU until a layer needs them (ZeRO 3)."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and compute the layer again in the backward pass: less memory, a third more work."""
    reference: Literal["resident", "offloaded", "sharded"] = "resident"
    """Where the reference policy is while nobody needs it, if loss.kl_coef > 0: whole on each rank's device, in the
    CPU's memory, or sharded over the ranks by ZeRO 3. With LoRA it is the model without its adapters: no memory."""
    updates: int = Field(100, ge=1)
    """Policy updates of the run."""
    groups_per_update: int = Field(16, ge=1)
    """Complete groups an update trains on."""
    group_size: int = Field(8, ge=2)
    """Episodes of a group: two or more, since advantages are relative within it."""
    dynamic_sampling: bool = False
    """Drop groups whose episodes all have the same reward, and play further groups instead (DAPO)."""
    dynamic_sampling_limit: int = Field(10, ge=1)
    """Give up with an error when more than so many times `groups_per_update` groups were dropped for one update."""
    max_staleness: int = Field(1, ge=0)
    """Oldest policy a group may come from, in updates; 0: synchronous, on-policy."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps an update's rows are split into. The policy version counts updates."""
    microbatch_tokens: int = Field(8192, ge=64)
    """Most tokens of one forward pass."""
    packing: Literal["auto", "packed", "rows"] = "auto"
    """`packed`: many rows in one forward pass, with shared beginnings computed once. `rows`: each through the model's
    own forward pass. `auto`: packed where a measurement at the start finds it to be the model's own function."""
    logits_mib: int = Field(256, ge=1)
    """Most MiB of float32 logits held at once; beyond it they are done in pieces, again in the backward pass."""
    threads: int = Field(1, ge=1)
    """CPU threads of a rank (CPU back end only)."""
    max_logprob_gap: float | None = Field(0.2, gt=0, allow_inf_nan=False)
    """Give up when sampler and learner are more than so many nats apart in three updates in a row: mean |log π − log μ|
    of the tokens that the version being updated sampled, or of all where five updates had none of those. The same
    weights are about 1e-5 apart in float32 and 0.01 in bfloat16, mixtures of experts with a router that falls the other
    way up to 0.1, wrong weights more. none: never."""
    group_timeout_s: Seconds = 900.0
    """Give up with an error when no group completes for this long."""
    max_restarts: int = Field(3, ge=0)
    """Times the learner's ranks are restarted from the last checkpoint within one run."""


class CheckpointConfig(Section):
    every: int = Field(10, ge=1)
    """Updates between checkpoints. Groups are acknowledged only after the checkpoint that records them."""
    keep: int = Field(2, ge=2)
    """Newest checkpoints kept: with two, a damaged one is not the end of the run."""
    keep_best: bool = True
    """Also keep the policy that was best in the panels of `evaluation.every`, as a Hugging Face folder."""


class EvaluationConfig(Section):
    split: str | tuple[str, ...] | None = None
    """Split of the evaluation panels, or several, as in `[valid_seen, valid_unseen]`: each has panels and figures of
    its own, and success over all of them decides on the best policy. none: the first of `valid_unseen`, `valid_seen`,
    `test` there is."""
    episodes: int = Field(128, ge=1)
    """Tasks of a panel, from the first of the split on. One panel is the whole split where that is smaller."""
    panels: int = Field(1, ge=1)
    """Panels, each of the tasks after those of the one before: no task is in two of them."""
    seeds: int = Field(1, ge=1)
    """Episodes of each task, each with a sampling seed of its own. Intervals are over tasks, however many there are."""
    temperature: Temperature = 0.4
    """Sampling temperature in evaluation (0.4 as published)."""
    every: int | None = Field(None, ge=1)
    """Play the panel before a training run and after every so many updates, the learner waiting; none: never."""

    @field_validator("split", mode="before")
    @classmethod
    def _names_splits(cls, value: object) -> object:
        if value is None:
            return value
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) for n in names):
            raise ValueError("must be the name of a split, or a list of several")
        if value == "":
            raise PydanticCustomError("string_too_short", "must not be empty")
        if "" in names:
            raise ValueError("must not hold an empty name")
        return value

    @property
    def most_episodes(self) -> int:
        """Episodes of all panels; fewer where a single one is larger than its split."""
        return self.episodes * self.panels * self.seeds * max(1, len(self.splits))

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are named, each once."""
        return (self.split,) if isinstance(self.split, str) else tuple(dict.fromkeys(self.split or ()))


LONGEST_LEASE_S = 86_400.0
"""Of an owner: a longer one in Redis is not of a run's making, and nobody would wait for its end."""


class BufferConfig(Section):
    redis_url: RedisAddress | None = None
    """Redis to use; none: `$REDIS_URL`, else a redis-server of the run's own with its data in the run's folder."""
    timeout_s: Seconds = 10.0
    """Time limit of one Redis command."""
    reconnect_s: Seconds = 60.0
    """How long to retry before a lost Redis is an error."""
    max_mib: int = Field(2048, ge=1)
    """Cap on the stored trajectories; beyond it actors wait."""
    owner_lease_s: float = Field(30.0, gt=0, le=LONGEST_LEASE_S)
    """A run that gave no sign of life for so long may be replaced by another process that wants its name."""


class WeightsConfig(Section):
    channel: Literal["ray", "directory", "nccl"] = "ray"
    """`ray`: the object store. `directory`: safetensors in a folder that all can read. `nccl`: vLLM's transfer
    engine, from the first GPU that `anchorage train` sees to the actors' GPUs, which must be others; not with LoRA."""
    directory: Path | None = None
    """Folder of the `directory` channel; none: `weights` in the run's folder."""
    update: Literal["in_flight", "at_step", "at_episode"] = "in_flight"
    """When an actor takes a new version: at once with requests kept, between steps, or between episodes."""
    timeout_s: Seconds = 120.0
    """Time limit of one transfer."""


TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
EARLIER_KEYS = ("tensorboard", "wandb", "wandb_project")


class TelemetryConfig(Section):
    trackers: tuple[Annotated[str, Choice(TRACKERS)], ...] = ("tensorboard",)
    """Where metrics go besides `metrics.jsonl`: `tensorboard` (event files in the run's folder), `wandb`, `mlflow`,
    `trackio`, plug-ins (`module:name`, `./file.py:name`)."""
    params: dict[str, Params] = Field(default_factory=dict)
    """Parameters of trackers by their names, as in `telemetry.params.wandb.mode=offline`. A plug-in's stand under the
    name after its colon."""
    keep_groups_mib: int = Field(512, ge=0)
    """Cap on the groups kept in the run's folder for the dashboard, the oldest go first; 0: none are kept."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    def params_key(self, tracker: str) -> str:
        """The name in `params` of one of `trackers`."""
        return tracker.rpartition(":")[2]

    @model_validator(mode="before")
    @classmethod
    def _earlier_keys(cls, tree: object) -> object:
        """Recipes of before say `tensorboard: false`, `wandb: offline` and `wandb_project: name`."""
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
            f"telemetry.params.{name}: telemetry.trackers has no such tracker{did_you_mean(name, known)}"
            for name in self.params
            if name not in known
        ]
        if lines:
            raise ValueError("\n".join(lines))
        return self


class Config(Section):
    """The whole of a run."""

    algorithm: Algorithm = "gigpo"
    """Advantage estimator, and defaults of other fields that its paper sets (see `presets`); what is given wins. A
    plug-in (`module:name`, `./file.py:name`) is an estimator of your own, which sets no defaults."""
    plugins: PluginsConfig = PluginsConfig()
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    envs: tuple[EnvConfig, ...] = ()
    """Several environments in one run, in place of `env`: each group comes from one of them, in the shares of their
    weights."""
    prompt: PromptConfig = PromptConfig()
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
        if problems := [*self._conflicts()]:
            raise ValueError("\n".join(problems))
        return self

    def _conflicts(self) -> Iterator[str]:
        learner = self.learner
        if learner.zero_stage == 0 and self.model.dtype == "bfloat16":
            yield "learner.zero_stage: must be 1 or more with model.dtype=bfloat16, got 0"
        if learner.zero_stage == 0 and learner.offload_optimizer:
            yield "learner.offload_optimizer: needs learner.zero_stage 1, 2 or 3, got 0"
        if learner.zero_stage < 3 and learner.offload_parameters:
            yield f"learner.offload_parameters: needs learner.zero_stage 3, got {learner.zero_stage}"
        if self.weights.channel == "nccl" and self.model.lora is not None:
            yield "weights.channel: nccl sends whole models; with model.lora use ray or directory"

    @property
    def environments(self) -> tuple[EnvConfig, ...]:
        """The environments of the run, one or more."""
        return self.envs or (self.env,)

    def environment(self, name: str) -> EnvConfig:
        """The settings of the environment called `name`; those of `env` where it is the only one."""
        return next((env for env in self.envs if env.name == name), self.env)

    @model_validator(mode="after")
    def _environments_are_distinct(self) -> Config:
        names = [env.name for env in self.envs]
        if len(set(names)) < len(names):
            raise ValueError("envs must have different names")
        total = sum(env.weight for env in self.envs)
        if any(env.weight < total / 100 for env in self.envs):
            raise ValueError("envs: a weight must be at least a hundredth of their sum")
        return self
