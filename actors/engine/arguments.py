"""Checks `rollout.engine` against the arguments of the installed vLLM, without importing it.

Names and types are read from the source of vLLM's `EngineArgs`: importing vLLM takes seconds and much memory. Types
that are themselves names in vLLM (choices, enumerations) are looked up in the modules that they come from.

Invariants
- An argument that the project sets itself, or that would change what is sampled, is refused with the reason.
- A type that cannot be read accepts anything: vLLM itself has the last word when an engine starts.

Example: `kv_cache_dtype: CacheDType`, and `CacheDType = Literal["auto", "fp8", …]` in vLLM's module `config.cache`.

    {"kv_cache_dtype": "fp8"}   no problem
    {"kv_cache_dtype": "fp9"}   rollout.engine.kv_cache_dtype: must be one of auto, …, got 'fp9', did you mean fp8?
    {"kv_cache_dtyp": "fp8"}    rollout.engine.kv_cache_dtyp: vLLM has no such argument, did you mean kv_cache_dtype?
    {"seed": 1}                 rollout.engine.seed: cannot be set here: run.seed sets it
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from services.config import mistakes
from services.errors import did_you_mean

_MODEL = "the model is the folder of model.path"
_ALONE = "an engine is one process with rollout.tensor_parallel workers"
_SAMPLED = "it would change the distribution whose log-probabilities the learner trains on"
_UPDATES = "weights are updated by the project's own transfer"
_ADAPTERS = "adapters are added to the weights before vLLM loads them"
RESERVED = MappingProxyType(
    {
        "seed": "run.seed sets it",
        "dtype": "model.dtype sets it",
        "max_model_len": "model.max_prompt_tokens and model.max_response_tokens set it",
        "max_num_seqs": "rollout.episodes_in_flight sets it",
        "tensor_parallel_size": "rollout.tensor_parallel sets it",
        "gpu_memory_utilization": "rollout.gpu_memory_utilization sets it",
        "kv_cache_memory_bytes": "rollout.kv_cache_mib sets it on CPUs, rollout.gpu_memory_utilization on GPUs",
        "trust_remote_code": "code in a model's folder is not run",
        "logprobs_mode": "the learner needs log-probabilities of the distribution that is sampled",
        "enable_chunked_prefill": "it is on for GPUs, and crashes vLLM on CPUs",
        "async_scheduling": "a batch launched before an update would be labelled with the version after it",
        "distributed_executor_backend": _ALONE,
        **dict.fromkeys(("model", "model_weights", "served_model_name", "hf_config_path", "hf_overrides"), _MODEL),
        **dict.fromkeys(("config_format", "revision", "code_revision", "hf_token", "download_dir"), _MODEL),
        **dict.fromkeys(("tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init"), _MODEL),
        **dict.fromkeys(("load_format", "model_loader_extra_config", "weight_transfer_config"), _UPDATES),
        **dict.fromkeys(("worker_cls", "worker_extension_cls", "enable_sleep_mode", "scheduler_cls"), _UPDATES),
        **dict.fromkeys(("generation_config", "override_generation_config", "logits_processors"), _SAMPLED),
        **dict.fromkeys(("watermark_config", "runner", "convert", "pooler_config"), _SAMPLED),
        **dict.fromkeys(("pipeline_parallel_size", "nnodes", "node_rank", "master_addr", "master_port"), _ALONE),
        **dict.fromkeys(("prefill_context_parallel_size", "decode_context_parallel_size", "device_ids"), _ALONE),
    }
)
"""Arguments that a recipe must not set, with the reason."""
_RESERVED_STARTS = MappingProxyType({"data_parallel_": _ALONE, "enable_lora": _ADAPTERS, "_": "it is not public"})
BLOCK_TOKENS_CPU, BLOCK_TOKENS_GPU = 32, 16
"""What the block size must be a multiple of: `get_supported_kernel_block_sizes` of vLLM's attention back ends. On GPUs
some want more, which depends on the card and the model: vLLM itself refuses those."""
MOST_SHOWN = 12
"""Choices that an error lists."""
_PLAIN: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "dict": (dict,),
    "list": (list,),
    "set": (list,),
}
_WORDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "dict": "a section"}
_WORDS |= {"list": "a list", "set": "a list", "None": "null"}


@dataclass(frozen=True, slots=True)
class Kind:
    """What an argument accepts.

    Attributes:
        plain: names of plain types.
        choices: accepted texts and numbers.
        anything: whether any value is accepted.
    """

    plain: frozenset[str] = frozenset()
    choices: tuple[object, ...] = ()
    anything: bool = False

    def joined(self, other: Kind) -> Kind:
        return Kind(self.plain | other.plain, self.choices + other.choices, self.anything or other.anything)

    def accepts(self, value: object) -> bool:
        if self.anything or value in self.choices:
            return True
        if value is None:
            return "None" in self.plain
        if isinstance(value, bool):
            return "bool" in self.plain
        return any(isinstance(value, _PLAIN[name]) for name in self.plain - {"None", "bool"})

    def words(self) -> str:
        """What is accepted, for an error."""
        named = [_WORDS[name] for name in sorted(self.plain, key=lambda name: (name == "None", name))]
        some = ", ".join(map(str, self.choices[:MOST_SHOWN])) + (", …" if len(self.choices) > MOST_SHOWN else "")
        return " or ".join([*([f"one of {some}"] if self.choices else []), *named])


def problems(given: Mapping[str, Any], sequences: int, *, on_cpu: bool) -> Iterator[str]:
    """Yield what is wrong with `rollout.engine`, one line each.

    Args:
        given: the mapping.
        sequences: requests at the same time, for which one step must have room.
        on_cpu: whether this vLLM computes on CPUs.
    """
    if not given:
        return
    known = engine_arguments()
    for name, value in given.items():
        key = f"rollout.engine.{name}"
        reason = RESERVED.get(name) or next((why for s, why in _RESERVED_STARTS.items() if name.startswith(s)), None)
        if reason is not None:
            yield f"{key}: cannot be set here: {reason}"
        elif known and name not in known:
            free = [other for other in known if other not in RESERVED and not other.startswith(tuple(_RESERVED_STARTS))]
            yield f"{key}: vLLM has no such argument{did_you_mean(name, free)}"
        elif known and not known[name].accepts(value):
            texts = [str(choice) for choice in known[name].choices]
            hint = did_you_mean(value, texts) if isinstance(value, str) else ""
            yield f"{key}: must be {known[name].words()}, got {mistakes.shown(key, value)}{hint}"
    tokens = given.get("max_num_batched_tokens")
    if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens < sequences:
        yield (
            f"rollout.engine.max_num_batched_tokens={tokens} is below the {sequences} requests at the same time "
            "(rollout.episodes_in_flight): each needs one token of a step"
        )
    block, unit = given.get("block_size"), BLOCK_TOKENS_CPU if on_cpu else BLOCK_TOKENS_GPU
    if isinstance(block, int) and not isinstance(block, bool) and (block < 1 or block % unit):
        nearest = max(unit, round(block / unit) * unit)
        yield (
            f"rollout.engine.block_size={block}: vLLM's attention on {'CPUs' if on_cpu else 'GPUs'} takes blocks of a "
            f"multiple of {unit} tokens; use {nearest}"
        )


@cache
def engine_arguments() -> Mapping[str, Kind]:
    """The arguments of the installed vLLM's engine; empty where vLLM is missing or has another layout."""
    found = find_spec("vllm")
    folder = Path(next(iter(found.submodule_search_locations or ()), "")) if found is not None else None
    if folder is None:
        return {}
    reader = _Reader(folder)
    module = reader.module("vllm.engine.arg_utils")
    if module is None:
        return {}
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
            fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
            return {f.target.id: reader.kind(f.annotation, module) for f in fields if isinstance(f.target, ast.Name)}
    return {}


@dataclass
class _Module:
    """A parsed module: its tree, and where its imported names come from."""

    tree: ast.Module
    imported: dict[str, str] = field(default_factory=dict)


class _Reader:
    """Reads types from vLLM's source."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[str, _Module | None] = {}

    def module(self, name: str) -> _Module | None:
        """Parse a module of vLLM; None if there is no such file."""
        if name not in self._modules:
            self._modules[name] = self._parse(self._folder.parent.joinpath(*name.split(".")))
        return self._modules[name]

    def kind(self, annotation: ast.expr, module: _Module) -> Kind:
        """What an annotation accepts."""
        match annotation:
            case ast.Constant(value=None):
                return Kind(frozenset({"None"}))
            case ast.Constant(value=str(text)):
                return self.kind(ast.parse(text, mode="eval").body, module)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.kind(left, module).joined(self.kind(right, module))
            case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
                return Kind(choices=_constants(inner))
            case ast.Subscript(value=ast.Name() as outer):
                return self.kind(outer, module)
            case ast.Name(id=name) if name in _PLAIN:
                return Kind(frozenset({name}))
            case ast.Name(id=name):
                return self._named(name, module)
        return Kind(anything=True)

    def _parse(self, path: Path) -> _Module | None:
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        try:
            tree = ast.parse(file.read_text())
        except (OSError, SyntaxError, ValueError):
            return None
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level]
        return _Module(tree, {name.asname or name.name: str(n.module) for n in imports for name in n.names})

    def _named(self, name: str, module: _Module) -> Kind:
        """What a name of vLLM's accepts: the choices of a `Literal`, the members of an enumeration, else anything."""
        for node in module.tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=own)], value=value) if own == name:
                    return self.kind(value, module)
                case ast.AnnAssign(target=ast.Name(id=own), value=ast.expr() as value) if own == name:
                    return self.kind(value, module)
                case ast.ClassDef(name=own) if own == name:
                    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                    return _members(node) if bases & {"Enum", "StrEnum", "IntEnum"} else Kind(anything=True)
        source = self.module(module.imported[name]) if name in module.imported else None
        return self._named(name, source) if source is not None else Kind(anything=True)


def _members(node: ast.ClassDef) -> Kind:
    """The members of an enumeration, in both spellings; `auto` and null stand for vLLM's choice."""
    names = [t.id for a in node.body if isinstance(a, ast.Assign) for t in a.targets if isinstance(t, ast.Name)]
    names = [name for name in names if not name.startswith("_")]
    return Kind(choices=("auto", *names, *(name.lower() for name in names)))


def _constants(node: ast.expr) -> tuple[object, ...]:
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return tuple(part.value for part in parts if isinstance(part, ast.Constant))
