"""What a plan assumes: figures that neither the recipe nor the model's shape determines.

Each can be changed with `anchorage plan … --assume NAME=VALUE`; the plan prints those that it used.

Invariants
- Nothing here was measured on the machine that is planned for. What depends on the card is for an A100 with 80 GB,
  rounded to the cautious side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from services.errors import AnchorageError, did_you_mean

_ZERO = ("cached", "shared", "fragmentation")
"""Assumptions that may be 0."""
_SHARES = (
    *("usable", "fragmentation", "learner_share", "prefill_share", "decode_share"),
    *("steps", "prompt", "response", "cached", "shared"),
)


class AssumptionInvalid(AnchorageError):
    """`--assume` names no assumption, or its value is not a number."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Memory in GiB, throughput of one GPU, and means of what is played.

    Attributes:
        usable: share of a card's nominal memory that programs can allocate.
        context_gib: of each process on a card: CUDA, cuBLAS, NCCL.
        fragmentation: of what a rank allocates in each pass, the share that is lost between the pieces.
        graphs_gib: vLLM's CUDA graphs.
        tflops: of matrix products in `model.dtype`.
        learner_share: share of `tflops` that the learner reaches.
        prefill_share: share of `tflops` that vLLM reaches in prompts.
        memory_gb_s: memory bandwidth of a card.
        decode_share: share of `memory_gb_s` that vLLM reaches while it samples.
        step_ms: of one step of vLLM besides reading memory.
        weights_gb_s: of a weight update, from the learner to an actor.
        host_gb_s: of copies between a card and host memory.
        environment_s: of one action in the environment.
        steps: mean length of an episode, as a share of `env.max_steps`.
        prompt: mean length of a prompt, as a share of `model.max_prompt_tokens`.
        response: mean length of a response, as a share of `model.max_response_tokens`.
        cached: share of prompt tokens that vLLM's prefix cache holds already.
        shared: share of an update's tokens that the learner does not compute twice.
        process_gib: host memory of the run's process and each rollout actor.
        gpu_process_gib: host memory of each rank and each engine with CUDA's libraries.
        cpu_process_gib: host memory of each rank and each engine without them.
        environment_gib: host memory of each environment server.
    """

    usable: float = 0.98
    context_gib: float = 1.0
    fragmentation: float = 0.05
    graphs_gib: float = 1.0
    tflops: float = 300.0
    learner_share: float = 0.3
    prefill_share: float = 0.4
    memory_gb_s: float = 2000.0
    decode_share: float = 0.5
    step_ms: float = 8.0
    weights_gb_s: float = 1.0
    host_gb_s: float = 10.0
    environment_s: float = 0.05
    steps: float = 0.5
    prompt: float = 0.4
    response: float = 0.4
    cached: float = 0.5
    shared: float = 0.2
    process_gib: float = 0.8
    gpu_process_gib: float = 3.0
    cpu_process_gib: float = 0.7
    environment_gib: float = 0.3

    def changed(self, given: Sequence[str]) -> Assumptions:
        """Return these with each `name=value` applied. Raises AssumptionInvalid."""
        known = [field.name for field in fields(self)]
        values: dict[str, float] = {}
        for each in given:
            name, _, text = each.partition("=")
            if name not in known:
                raise AssumptionInvalid(f"--assume {name}: no such assumption{did_you_mean(name, known)}")
            try:
                values[name] = float(text)
            except ValueError:
                raise AssumptionInvalid(f"--assume {name}: must be a number, got {text!r}") from None
            if not 0 < values[name] < 1e9 and not (values[name] == 0 and name in _ZERO):
                raise AssumptionInvalid(f"--assume {name}: must be > 0, got {text}")
            if name in _SHARES and values[name] > 1:
                raise AssumptionInvalid(f"--assume {name}: is a share and must be <= 1, got {text}")
            if name == "shared" and values[name] == 1:
                raise AssumptionInvalid("--assume shared: must be < 1, since each token is computed once, got 1")
        return replace(self, **values)

    def record(self) -> dict[str, float]:
        return asdict(self)
