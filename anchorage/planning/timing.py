"""How long an update takes, and the longest episode: from assumed throughputs, so these are estimates.

- Sampling reads the weights and the running requests' KV cache once for each token of every request.
- The learner does 2 operations a parameter and token forward, 4 backward, 2 more where layers are recomputed, where the
  reference policy scores, and where π_old needs a pass of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from anchorage.planning.assumptions import Assumptions
from anchorage.planning.shapes import Shape
from anchorage.planning.states import number_bytes, states_of, trained_parameters
from services.config.tree import Config


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds.

    Attributes:
        rollout: of the episodes of one update.
        learner: of one update on the ranks.
        weights: until the new version samples.
        longest: of an episode with the most steps, each with the longest response.
        update: of one update: the longer of rollout and learner if they overlap, else both; with weights and moving.
        moving: of a rank's states to host memory and back, where ranks and engine take turns on the cards.
    """

    rollout: float
    learner: float
    weights: float
    longest: float
    update: float
    moving: float


def timing_of(shape: Shape, config: Config, assumed: Assumptions) -> Timing:
    """Estimate the seconds of a run on GPUs."""
    rollout, learner, model = config.rollout, config.learner, config.model
    episodes = learner.groups_per_update * learner.group_size
    steps = max(1.0, assumed.steps * max(env.max_steps for env in config.environments))
    prompt, response = assumed.prompt * model.max_prompt_tokens, assumed.response * model.max_response_tokens
    running = min(rollout.episodes_in_flight, math.ceil(episodes / rollout.actors))
    sampling = _step(shape, config, assumed, running, prompt + response)
    waves = max(1.0, episodes / (rollout.actors * running))
    decode = waves * steps * (response * sampling + assumed.environment_s)
    prefill_tokens = episodes * steps * prompt * (1 - assumed.cached) / rollout.actors
    prefill = 2 * shape.active * prefill_tokens / _flops(assumed, assumed.prefill_share, rollout.tensor_parallel)
    trained = episodes * steps * (prompt + response) * (1 - assumed.shared)
    update = trained * _operations(shape, config) / _flops(assumed, assumed.learner_share, learner.ranks)
    sent = shape.parameters if model.lora is None else trained_parameters(shape, config)
    weights = number_bytes(config) * sent / (assumed.weights_gb_s * 1e9)
    turns = rollout.share_gpus == "turns"
    moving = 2 * states_of(shape, config).movable / (assumed.host_gb_s * 1e9) if turns else 0.0
    overlap = learner.max_staleness > 0 and not turns
    both = (max(decode + prefill, update) if overlap else decode + prefill + update) + weights + moving
    return Timing(decode + prefill, update, weights, _longest(shape, config, assumed), both, moving)


def _longest(shape: Shape, config: Config, assumed: Assumptions) -> float:
    """Seconds of the longest episode, with as many beside it as one actor plays at most."""
    context = config.model.max_prompt_tokens + config.model.max_response_tokens
    slowest = _step(shape, config, assumed, config.rollout.episodes_in_flight, context / 2)
    steps = max(env.max_steps for env in config.environments)
    prompt = 2 * shape.active * config.model.max_prompt_tokens * (1 - assumed.cached)
    first = config.rollout.episodes_in_flight * prompt / _flops(assumed, assumed.prefill_share, 1)
    return steps * (config.model.max_response_tokens * slowest + first / 2 + assumed.environment_s)


def _step(shape: Shape, config: Config, assumed: Assumptions, running: int, length: float) -> float:
    """Seconds of one step of the engine: a token of each running request."""
    number = number_bytes(config)
    cached = running * length * 2 * shape.layers * shape.keys * number
    read = (number * shape.parameters + cached) / config.rollout.tensor_parallel
    return read / (assumed.memory_gb_s * 1e9 * assumed.decode_share) + assumed.step_ms / 1000


def _operations(shape: Shape, config: Config) -> float:
    """Operations of the learner for a token."""
    learner, loss = config.learner, config.loss
    passes = 6 if config.model.lora is None else 4
    passes += 2 if learner.activation_checkpointing else 0
    passes += 2 if loss.kl_coef > 0 else 0
    passes += 2 if loss.importance_cap is not None and learner.minibatches > 1 else 0
    return passes * shape.active


def _flops(assumed: Assumptions, share: float, cards: int) -> float:
    return assumed.tflops * 1e12 * share * cards
