"""The sizes of a causal language model that memory and time follow from, read from its `config.json`.

Weights are not loaded; neither torch nor transformers is imported. Models that the recipes name have their published
sizes here, so that a run can be planned before its model is downloaded.

Invariants
- A folder's `config.json` takes precedence over the published sizes.
- What the file does not say is what transformers assumes for that model type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from services.errors import ModelUnavailable, first_line

_HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "exaone4", "hunyuan_v1_dense")
_FLOAT_NORMS = ("gemma", "gemma3", "gemma3_text", "olmo2", "olmo3")
_POST_NORMS = ("olmo2", "olmo3", "exaone4")
"""Results of attention and dense part are normalised, not their inputs."""
_FOUR_NORMS = ("gemma3", "gemma3_text", "glm4")
"""Inputs and results are normalised."""
_FUSED = ("phi3", "gpt2")
"""Query, key and value are parts of one tensor, so keeping one keeps all."""
_QKV_BIAS = ("qwen2", "qwen2_moe", "gpt2")
_TIED = ("gpt2", "gemma")
"""Model types whose `tie_word_embeddings` is true unless the file says otherwise."""
COUNTED = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "granite", "smollm3", "seed_oss", "gemma", "gemma3_text"),
    *("olmo2", "olmo3", "exaone4", "glm4", "hunyuan_v1_dense", "mixtral", "qwen2_moe", "qwen3_moe"),
)
"""Model types whose activations are compared with measured ones in the tests. Others are counted like Llama."""


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of a layer's dense part.

    Attributes:
        number: of routed experts in a layer.
        chosen: experts that each token is sent to.
        width: inner width of one.
        layers: number of layers that have them; the others are dense.
        shared: inner width of an expert that every token uses, scaled by a gate; 0: there is none.
    """

    number: int
    chosen: int
    width: int
    layers: int
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model.

    Attributes:
        kind: model type, as in `config.json`.
        layers: number of them.
        hidden: width of the residual stream.
        inner: width of a dense layer's inner part.
        heads: of queries.
        kv_heads: of keys and values.
        head: width of one head.
        vocabulary: width of the logits.
        tied: whether the head's weight is that of the embedding.
        positions: number of learned positions; 0: rotary ones.
        activation: name of the activation function.
        gated: whether the dense part multiplies the activation by a second projection.
        norm: `rms`: normalised in float32, then scaled in the model's type. `rms_float`: scaled in float32 too.
            `layer`: PyTorch's layer norm.
        before: whether the inputs of attention and dense part are normalised.
        after: whether their results are.
        head_norms: whether queries and keys are normalised: each head, or all heads together.
        fused: whether queries, keys and values are parts of one tensor.
        qkv_bias: whether their projections have a bias.
        out_bias: whether the projection of attention's result has one.
        biases: whether all other projections and the norms have one.
        experts: of the sparse layers; None: all layers are dense.
        stored: number of parameters in the folder's files; 0: not known.
    """

    kind: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool
    positions: int = 0
    activation: str = "silu"
    gated: bool = True
    norm: Literal["rms", "rms_float", "layer"] = "rms"
    before: bool = True
    after: bool = False
    head_norms: Literal["", "each", "all"] = ""
    fused: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    biases: bool = False
    experts: Experts | None = None
    stored: int = 0

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """Width of all keys of a token, which is that of its values."""
        return self.kv_heads * self.head

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding, the largest matrix of most models."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Number of parameters: the folder's own where it has weights, else computed from the sizes."""
        return self.stored or self.computed

    @property
    def computed(self) -> int:
        """Number of parameters by the sizes alone."""
        sparse = self.experts.layers if self.experts is not None else 0
        outside = self.embedding * (1 if self.tied else 2) + self.positions * self.hidden + self._norm
        whole = self.layers * self._attention + (self.layers - sparse) * self._dense
        return outside + whole + (sparse * self._sparse if self.experts is not None else 0)

    @property
    def active(self) -> int:
        """Parameters that one token uses: of the experts only those it is sent to; the embedding is a lookup."""
        used = self.computed - (0 if self.tied else self.embedding)
        if self.experts is None:
            return used
        idle = self.experts.number - self.experts.chosen
        return used - self.experts.layers * idle * 3 * self.hidden * self.experts.width

    @property
    def linear_layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of a layer that adapters are added to by `all-linear`."""
        qkv = [(self.hidden, self.queries), (self.hidden, self.keys), (self.hidden, self.keys)]
        if self.fused:
            qkv = [(self.hidden, self.queries + 2 * self.keys)]
        dense = [(self.hidden, self.inner)] * (2 if self.gated else 1) + [(self.inner, self.hidden)]
        if self.gated and self.fused:
            dense = [(self.hidden, 2 * self.inner), (self.inner, self.hidden)]
        return [*qkv, (self.queries, self.hidden), *(dense if self.experts is None else [])]

    @property
    def _norm(self) -> int:
        return self.hidden * (2 if self.norm == "layer" else 1)

    @property
    def _attention(self) -> int:
        """Parameters of a layer's attention and norms."""
        wide = self.queries + 2 * self.keys
        bias = (wide if self.qkv_bias else 0) + (self.hidden if self.biases or self.out_bias else 0)
        norms = 2 * (int(self.before) + int(self.after)) * self._norm
        norms += {"": 0, "each": 2 * self.head, "all": self.queries + self.keys}[self.head_norms]
        return self.hidden * (wide + self.queries) + bias + norms

    @property
    def _dense(self) -> int:
        projections = 3 if self.gated else 2
        bias = (projections - 1) * self.inner + self.hidden if self.biases else 0
        return projections * self.hidden * self.inner + bias

    @property
    def _sparse(self) -> int:
        assert self.experts is not None
        shared = self.experts.shared * 3 * self.hidden + (self.hidden if self.experts.shared else 0)
        return self.experts.number * (3 * self.hidden * self.experts.width + self.hidden) + shared


def _qwen(kind: str, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, *, tied: bool) -> Shape:
    vocabulary = 152_064 if (kind, hidden) == ("qwen2", 3584) else 151_936
    newer = kind == "qwen3"
    return Shape(
        kind,
        layers,
        hidden,
        inner,
        heads,
        kv_heads,
        128,
        vocabulary,
        tied,
        head_norms="each" if newer else "",
        qkv_bias=not newer,
    )


PUBLISHED: MappingProxyType[str, Shape] = MappingProxyType(
    {
        "Qwen2.5-0.5B-Instruct": replace(_qwen("qwen2", 24, 896, 4864, 14, 2, tied=True), head=64),
        "Qwen2.5-1.5B-Instruct": _qwen("qwen2", 28, 1536, 8960, 12, 2, tied=True),
        "Qwen2.5-3B-Instruct": _qwen("qwen2", 36, 2048, 11008, 16, 2, tied=True),
        "Qwen2.5-7B-Instruct": _qwen("qwen2", 28, 3584, 18944, 28, 4, tied=False),
        "Qwen3-4B": _qwen("qwen3", 36, 2560, 9728, 32, 8, tied=True),
    }
)
"""Sizes by the last part of `model.path`, as the models' own `config.json` has them."""


def shape_of(folder: Path) -> Shape:
    """Read the sizes of the model in a folder, or take the published ones of a model of that name.

    Raises:
        ModelUnavailable: the folder has no `config.json` and its name is not known, or the file lacks a size.
    """
    from services.model_folder import stored_parameters

    file = folder / "config.json"
    if not file.is_file():
        if folder.name in PUBLISHED:
            return PUBLISHED[folder.name]
        raise ModelUnavailable(
            f"model.path {folder} has no config.json, which a plan needs: download the model, or at least that file"
        )
    try:
        whole = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"cannot read {file}: {error}") from None
    if not isinstance(whole, dict):
        raise ModelUnavailable(f"{file} is not the configuration of a Hugging Face model")
    try:
        return replace(shape_from(whole), stored=stored_parameters(folder))
    except KeyError as error:
        raise ModelUnavailable(f"{file}: {error.args[0]} is missing, which a plan needs") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelUnavailable(f"{file} has sizes of another form than a plan reads: {first_line(error)}") from None


def shape_from(whole: Mapping[str, Any]) -> Shape:
    """Convert the content of a `config.json`.

    Raises:
        KeyError: a size is missing; its name.
        ValueError, TypeError, ArithmeticError: a size is not a whole number of at least 1.
    """
    shape = _shape(whole)
    sizes = {
        **{"num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "intermediate_size": shape.inner},
        **{"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head},
        **{"vocab_size": shape.vocabulary},
    }
    if shape.experts is not None:
        sizes |= {"num_experts": shape.experts.number, "moe_intermediate_size": shape.experts.width}
    if wrong := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
        raise ValueError(f"{wrong[0]} must be >= 1")
    return shape


def _shape(whole: Mapping[str, Any]) -> Shape:
    nested = whole.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, dict) else whole
    kind = str(text.get("model_type") or whole.get("model_type") or "")
    hidden = _size(text, "hidden_size", "n_embd", "d_model")
    heads = _size(text, "num_attention_heads", "n_head", "n_heads")
    layers = _size(text, "num_hidden_layers", "n_layer", "n_layers")
    plain = kind == "gpt2"
    experts = _experts(text, layers)
    tied = text.get("tie_word_embeddings", whole.get("tie_word_embeddings", kind in _TIED))
    bias = bool(text.get("attention_bias"))
    return Shape(
        kind=kind,
        layers=layers,
        hidden=hidden,
        inner=int(text.get("intermediate_size") or text.get("n_inner") or text.get("ffn_dim") or 4 * hidden),
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head=int(text.get("head_dim") or hidden // heads),
        vocabulary=_size(text, "vocab_size"),
        tied=bool(tied),
        positions=_size(text, "n_positions", "max_position_embeddings") if plain else 0,
        activation=str(text.get("hidden_act") or text.get("activation_function") or ("gelu_new" if plain else "silu")),
        gated=not plain,
        norm="layer" if plain else "rms_float" if kind in _FLOAT_NORMS else "rms",
        before=kind not in _POST_NORMS,
        after=kind in _POST_NORMS or kind in _FOUR_NORMS,
        head_norms="each" if kind in _HEAD_NORMS else "all" if kind in ("olmo2", "olmo3") else "",
        fused=kind in _FUSED,
        qkv_bias=kind in _QKV_BIAS or bias,
        out_bias=bias and kind not in ("glm4", "seed_oss"),
        biases=plain,
        experts=experts,
    )


def _experts(text: Mapping[str, Any], layers: int) -> Experts | None:
    number = next(
        (text[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(key)), None
    )
    if not isinstance(number, int):
        return None
    every = int(text.get("decoder_sparse_step") or 1)
    dense = {int(layer) for layer in text.get("mlp_only_layers") or ()}
    first = int(text.get("first_k_dense_replace") or 0)
    sparse = sum(1 for i in range(layers) if (i + 1) % every == 0 and i not in dense and i >= first)
    # Mixtral's experts have the width of a dense layer, whatever else its file says.
    own = None if text.get("model_type") == "mixtral" else text.get("moe_intermediate_size")
    width = int(own or _size(text, "intermediate_size"))
    shared = int(text.get("shared_expert_intermediate_size") or 0) if text.get("model_type") == "qwen2_moe" else 0
    return Experts(number, int(text.get("num_experts_per_tok") or text.get("top_k") or 2), width, sparse, shared)


def _size(text: Mapping[str, Any], *names: str) -> int:
    """The first of the values that is there. Raises KeyError with the first name."""
    found = next((text[name] for name in names if isinstance(text.get(name), int)), None)
    if found is None:
        raise KeyError(names[0])
    return int(found)
