"""Memory of what a learner rank keeps between passes: parameters, gradients, optimizer state, reference, buffers.

It follows `learner/rank/engine_deepspeed.py` and DeepSpeed's optimizers: bfloat16 parameters have float32 master copies
and gradients are accumulated in float32. N parameters are trained on R ranks; bytes on a rank's device:

    stage            parameters   gradients       masters and moments
    0 (float32)      4 N          4 N             8 N
    1, bfloat16      2 N          2 N + 4 N       12 N / R
    1, float32       4 N          4 N             12 N / R
    2                2 or 4 N     4 N / R         12 N / R
    3                2 or 4 N / R 4 N / R         12 N / R

Example: Qwen2.5-1.5B in bfloat16 on one rank of stage 2: 2 + 4 + 12 = 18 bytes a parameter, 25.9 GiB.

With `learner.offload_optimizer` masters and moments are in host memory, with float32 gradients beside them. In bfloat16
gradients are accumulated on the device all the same: 4 N in stage 1, 4 N / R in stage 2.

Invariants
- Nothing is estimated here: where tests can measure (CPU, one and two ranks), they agree within 5 %.
- Frozen parameters have neither gradients nor optimizer state; only stage 3 shards them.
"""

from __future__ import annotations

from dataclasses import dataclass

from anchorage.planning.shapes import Shape
from services.config.tree import Config

BUCKET = 500_000_000
"""Numbers in DeepSpeed's bucket of gradients to reduce, allocated in full."""
LIVE = 1_000_000_000
"""Most numbers of gathered parameters at once (stage 3), and of an optimizer step's gradients at once."""
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class States:
    """Bytes of one rank.

    Attributes:
        parameters: on the device.
        gradients: on the device, kept between passes.
        optimizer: on the device: master copies and moments.
        reference: on the device, during the update.
        reference_alone: on the device, only while the reference scores, when nothing is kept for a backward pass.
        bucket: on the device, during the backward pass: DeepSpeed's buffer for communication.
        transient: on the device, during forward and backward pass: gathered parameters, the largest gradient twice.
        step: on the device, during the optimizer step, when there are no activations.
        host: in host memory, of off-loading.
        loading: in host memory, while the model is loaded.
    """

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    reference_alone: int
    bucket: int
    transient: int
    step: int
    host: int
    loading: int

    @property
    def movable(self) -> int:
        """What a rank moves to host memory where it takes turns on its device."""
        return self.parameters + self.gradients + self.optimizer + self.reference


def number_bytes(config: Config) -> int:
    """Bytes of a number in `model.dtype`."""
    return 2 if config.model.dtype == "bfloat16" else 4


def adapter_parameters(shape: Shape, config: Config) -> int:
    """Trained parameters of `model.lora`, as if every target were `all-linear`; 0 without adapters."""
    lora = config.model.lora
    if lora is None:
        return 0
    return shape.layers * sum(lora.rank * (inputs + outputs) for inputs, outputs in shape.linear_layers)


def trained_parameters(shape: Shape, config: Config) -> int:
    """Parameters that the optimizer updates."""
    return shape.parameters if config.model.lora is None else adapter_parameters(shape, config)


def states_of(shape: Shape, config: Config) -> States:
    """Compute the bytes of one rank."""
    learner, number = config.learner, number_bytes(config)
    trained = trained_parameters(shape, config)
    frozen = shape.parameters if config.model.lora is not None else 0
    share = -(-trained // learner.ranks)
    gradients, bucket, host = _gradients(trained, share, config)
    optimizer = 8 * trained if learner.zero_stage == 0 else 12 * share
    sharded = learner.zero_stage == 3
    parameters = number * (-(-(trained + frozen) // learner.ranks) if sharded else trained + frozen)
    if learner.offload_optimizer:
        # Stages 1 and 2 keep a copy in the model's type on its way back, and the largest gradient on its way here.
        passing = 0 if sharded else number * (share + shape.embedding)
        host, optimizer = host + optimizer + passing, 0
    if learner.offload_parameters:
        host, parameters = host + parameters, 0
    gathered = number * min(shape.parameters, LIVE) if sharded else 0
    largest = 2 * number * (shape.embedding if frozen == 0 else trained // shape.layers)
    resident, alone, kept = _reference(shape, config)
    # Masters of float32 parameters are copies too, and so is what the optimizer takes its step from.
    step = _FLOAT * min(share, LIVE) if sharded or number == _FLOAT else 0
    return States(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        reference=resident,
        reference_alone=alone,
        bucket=bucket,
        transient=gathered + largest,
        step=step if learner.zero_stage > 0 else 0,
        host=host + kept,
        loading=number * shape.parameters,
    )


def _gradients(trained: int, share: int, config: Config) -> tuple[int, int, int]:
    """Bytes of gradients and of the bucket on the device, and of gradients in host memory."""
    stage, number, offloaded = config.learner.zero_stage, number_bytes(config), config.learner.offload_optimizer
    bucket = number * BUCKET
    if stage == 0:
        return _FLOAT * trained, 0, 0
    if stage == 3:
        part = _FLOAT * share
        return (0, 2 * bucket, part) if offloaded else (part, 2 * bucket, 0)
    host = _FLOAT * share if offloaded else 0
    if number == _FLOAT:
        # The reduced gradients of a pass are added to those before; stage 1 keeps those of other ranks' parts too.
        others = _FLOAT * (trained - share) if stage == 1 else 0
        passing = bucket + _FLOAT * share
        return (others, passing, 2 * host) if offloaded else (others + _FLOAT * share, passing, 0)
    if stage == 2:
        return _FLOAT * share, bucket, host
    if offloaded:
        return _FLOAT * trained, _FLOAT * BUCKET, host
    return (number + _FLOAT) * trained, _FLOAT * min(trained, BUCKET), 0


def _reference(shape: Shape, config: Config) -> tuple[int, int, int]:
    """Bytes of the reference policy: on the device, there only while it scores, in host memory."""
    if config.loss.kl_coef == 0 or config.model.lora is not None:
        return 0, 0, 0
    whole = number_bytes(config) * shape.parameters
    kind = config.learner.reference
    if kind == "resident":
        return whole, 0, 0
    if kind == "offloaded":
        return 0, whole, whole
    return -(-whole // config.learner.ranks), number_bytes(config) * min(shape.parameters, LIVE), 0
