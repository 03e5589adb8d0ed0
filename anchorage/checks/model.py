"""Checks whether a model folder can be trained and served, and what is wrong where it cannot: `anchorage model check`.

Invariants
- Every result is a finding. A check that is pointless after an earlier failure is skipped, which is a finding too.
- Numbers are measured on the folder's own weights, with the functions that a run uses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from anchorage.checks.model_shape import positions, shape_problems
from anchorage.checks.tokenizer import Finding, tokenizer_findings
from services.config.tree import Config, LoraConfig
from services.errors import AnchorageError, ModelUnavailable, first_line
from services.model_folder import check_model_folder, stored_parameters

if TYPE_CHECKING:
    from anchorage.checks.engine_parity import Gap
    from learner.rank.parity import Parity

Dtype = Literal["float32", "bfloat16"]

CONTEXT = 256
"""Longest row that is compared, in tokens; shorter for a model with fewer positions. Larger windows are not tested."""
RESPONSE = 24
LEARNER_CASES = {
    "halves": "learner: rows alone",
    "packed alone": "learner: packed, one row",
    "packed": "learner: packed rows",
    "shared": "learner: shared beginnings",
}
ENGINE = "vLLM"


def check_model(
    folder: Path, dtype: Dtype, *, engine: bool = True, on_step: Callable[[str], None] = lambda text: None
) -> list[Finding]:
    """Run all checks. `engine`: also start vLLM, which takes most of the time. `on_step` gets each step as text."""
    try:
        check_model_folder(folder)
        stored_parameters(folder)
        config = _config(folder, dtype)
        unfit = list(shape_problems(folder, config)) if engine else []
    except AnchorageError as error:
        return [Finding("folder", "refused", "problem", str(error))]
    findings = tokenizer_findings(folder)
    on_step("measuring the learner")
    learner, trainable = _learner(folder, dtype, config)
    findings += learner
    if not trainable:
        return [*findings, *_skipped(ENGINE, "LoRA")]
    lora = _lora(folder, dtype)
    findings.append(lora)
    if unfit:
        return [*findings, *(Finding(ENGINE, "refused", "problem", line) for line in unfit)]
    if not engine:
        return [*findings, *_skipped(ENGINE)]
    on_step("starting vLLM")
    return [*findings, *_engine(folder, dtype, config, with_lora=lora.verdict == "ok")]


def is_fit(findings: list[Finding]) -> bool:
    """Return whether no finding is a problem."""
    return not any(finding.verdict == "problem" for finding in findings)


def _config(folder: Path, dtype: Dtype) -> Config:
    context = max(2, min(CONTEXT, positions(folder) or CONTEXT))
    response = min(RESPONSE, context // 2)
    lengths = {"max_prompt_tokens": context - response, "max_response_tokens": response}
    return Config.model_validate(
        {
            "model": {"path": folder, "dtype": dtype, **lengths},
            "rollout": {"episodes_in_flight": 8},
        }
    )


def _learner(folder: Path, dtype: Dtype, config: Config) -> tuple[list[Finding], bool]:
    """Check the learner's forward pass; return the findings and whether the model can be trained."""
    from learner.rank.parity import measure_folder

    try:
        parity = measure_folder(folder, dtype, config.model.max_prompt_tokens + config.model.max_response_tokens)
    except ModelUnavailable as error:
        return [Finding("learner", "refused", "problem", str(error))], False
    found = [finding for case in parity.cases if (finding := _case(case, parity)) is not None]
    if parity.refusal is not None:
        return [*found, Finding("learner", "refused", "problem", parity.refusal)], False
    if parity.reasons:
        line = f"rows go through the model one by one: {'; '.join(parity.reasons)}"
        return [*found, Finding("learner: path", parity.path, "note", line)], True
    return [*found, Finding("learner: path", parity.path)], True


def _case(case: object, parity: Parity) -> Finding | None:
    name, largest, mean, failure = (getattr(case, field) for field in ("name", "largest", "mean", "failure"))
    if name not in LEARNER_CASES:
        return None
    value = "not possible" if failure else f"{largest:.1e} nats, mean {mean:.1e}"
    exact = not failure and largest <= parity.bound
    # A path that is not exact is not used. Only when none is left is that a problem, see `refusal`.
    return Finding(LEARNER_CASES[name], value, "ok" if exact else "note", failure)


def _lora(folder: Path, dtype: Dtype) -> Finding:
    """Check which layers would get adapters; each is compared with the layer that merging it makes."""
    from learner.rank.disk_names import DiskForm
    from learner.rank.lora import adapt
    from learner.rank.policy import Route, load_policy

    try:
        policy = load_policy(folder, dtype, 1.0, route=Route(packed=False))
        adapters = adapt(policy, LoraConfig(), DiskForm(policy.lm, folder))
    except ModelUnavailable as error:
        return Finding("LoRA", "refused", "problem", str(error))
    kinds = sorted({name.rpartition(".")[2] for name in adapters.layers})
    return Finding("LoRA", f"{len(adapters.layers)} layers: {', '.join(kinds)}")


def _engine(folder: Path, dtype: Dtype, config: Config, *, with_lora: bool) -> list[Finding]:
    from anchorage.checks.engine_parity import measure_engine

    context = config.model.max_prompt_tokens + config.model.max_response_tokens
    try:
        gaps = measure_engine(folder, dtype, context, LoraConfig() if with_lora else None)
    except (AnchorageError, RuntimeError) as error:
        return [Finding(ENGINE, "refused", "problem", first_line(error))]
    return [_gap(gap, dtype) for gap in gaps]


def _gap(gap: Gap, dtype: Dtype) -> Finding:
    name = f"{ENGINE}: {gap.stage}"
    if gap.failure:
        return Finding(name, "refused", "problem", f"{ENGINE} {gap.stage}: {gap.failure}")
    value = f"{gap.largest:.1e} nats, mean {gap.mean:.1e}"
    from learner.sampler_check import bounds

    largest, mean = bounds(dtype)
    if gap.within(largest, mean):
        return Finding(name, value)
    line = (
        f"{ENGINE} {gap.stage} samples with other log-probabilities than the learner computes: they differ by "
        f"{gap.largest:.2g} nats, mean {gap.mean:.2g}; this model cannot be trained with this vLLM"
    )
    return Finding(name, value, "problem", line)


def _skipped(*names: str) -> list[Finding]:
    return [Finding(name, "not checked", "skipped") for name in names]
