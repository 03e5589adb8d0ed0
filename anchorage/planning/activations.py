"""Memory of activations in one forward and backward pass of the learner: what the backward pass keeps.

Each function adds up the tensors that PyTorch's autograd keeps for the operations of transformers' modules and of
`learner/rank/attention.py`, `forward.py` and `policy.py` in `learner/rank/`. Parameters and tensors that are views of
one already counted do not count again.

Example: a layer of Qwen2.5-1.5B in bfloat16 (hidden 1,536, inner 8,960, 12 and 2 heads of 128), bytes a token.

    2 norms       2 · (float32 input 6,144 + factor 4 + normalised 3,072 + scaled 3,072)    24,584
    attention     queries 3,072, keys and values 1,024, result 3,072, its sums 48            7,216
    copy          of the result, where sequences attend one after the other (CPU)            3,072
    dense part    gate, its activation, up, their product: 4 · 17,920                       71,680
                                                                                           106,552

Invariants
- Nothing is estimated here: where tests can measure (CPU), they agree within 5 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from anchorage.planning.shapes import Shape

Attention = Literal["flash", "each"]
"""`flash`: all sequences in one kernel (bfloat16 on GPUs). `each`: one sequence after the other."""

ACTIVATIONS_KEPT = MappingProxyType({"relu": 0, "gelu_new": 4, "gelu_fast": 5, "quick_gelu": 2})
"""Tensors that an activation function keeps besides its result, each of the size of its input; others keep one."""
_INDEX = 8
"""Bytes of a position or a token id."""
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass.

    Attributes:
        shape: of the model.
        number: bytes of a number in `model.dtype`.
        tokens: of the line.
        path: keys and values that are read, in tokens: more than `tokens` where sequences share beginnings.
        scored: response tokens.
        attention: how sequences attend.
        checkpointing: only the input of each layer is kept.
        masks: entries of the masks of sequences that share beginnings, where they attend one after the other.
        adapters: rank of adapters on all linear layers of the frozen model; 0: all parameters are trained.
        logits: most logits at once.
    """

    shape: Shape
    number: int
    tokens: int
    path: int
    scored: int
    attention: Attention = "flash"
    checkpointing: bool = False
    adapters: int = 0
    logits: int = 2**26
    masks: int = 0

    @property
    def kept(self) -> int:
        """Bytes that the backward pass keeps of body and head, without the logits of pieces that it recomputes."""
        layers = self.shape.layers
        if self.checkpointing:
            body = layers * self.number * self.shape.hidden * self.tokens
        else:
            body = sum(self._layer(sparse=sparse) * count for sparse, count in self._kinds())
            # With adapters nothing before the first of them has a gradient: the first norm keeps nothing.
            body -= self._norm(self.shape.hidden, 1) * self.tokens if self.adapters and self.shape.before else 0
            body += _INDEX * self.path if self.path > self.tokens else 0
        return body + self._around + self._head

    @property
    def a_layer(self) -> int:
        """Bytes that one layer keeps while it is recomputed: the larger kind of layer."""
        return max(self._layer(sparse=sparse) for sparse, _ in self._kinds())

    @property
    def backward_of_a_layer(self) -> int:
        """Bytes of gradients at once in the backward pass of one layer, without those of parameters."""
        shape = self.shape
        wide = shape.inner if shape.experts is None else max(shape.inner, shape.experts.chosen * shape.experts.width)
        return self.tokens * (3 * self.number * wide + (3 * _FLOAT + 2 * self.number) * shape.hidden)

    @property
    def pieces(self) -> int:
        """Pieces that the logits are computed in, as in `learner.rank.policy.Policy.forward`."""
        return max(1, -(-self.scored // max(1, self.logits // self.shape.vocabulary)))

    @property
    def logits_at_once(self) -> int:
        """Bytes of logits at the largest moment: log-probabilities, their exponentials, and the product or gradient."""
        return 3 * _FLOAT * self.shape.vocabulary * -(-self.scored // self.pieces)

    @property
    def a_token_and_layer(self) -> float:
        """Bytes that the layers keep, a token and layer."""
        whole = sum(self._layer(sparse=sparse) * count for sparse, count in self._kinds())
        return whole / self.shape.layers / self.tokens

    def _kinds(self) -> list[tuple[bool, int]]:
        """(whether it has experts, number of such layers), of the kinds that the model has."""
        sparse = self.shape.experts.layers if self.shape.experts is not None else 0
        return [kind for kind in ((False, self.shape.layers - sparse), (True, sparse)) if kind[1]]

    def _layer(self, *, sparse: bool) -> int:
        hidden = self.shape.hidden
        # Frozen experts and their router do not keep their input.
        inputs = 1 if sparse and self.adapters else 2
        norms = inputs * self.number * hidden
        norms += 2 * self._norm(hidden, 1) if self.shape.before else 0
        norms += 2 * self._norm(hidden, 1) if self.shape.after else 0
        part = self._sparse() if sparse else self._dense()
        return self._attention() + self.tokens * (norms + part) + self.number * self.masks

    def _norm(self, width: int, copies: int) -> int:
        """Bytes a token that norms of `width`, side by side, keep, without their results."""
        if self.shape.norm == "layer":
            return self.number * (width + 2) * copies
        scaled = _FLOAT if self.shape.norm == "rms_float" else self.number
        return (_FLOAT * (width + 1) + (0 if self.adapters else scaled * width)) * copies

    def _attention(self) -> int:
        """Bytes that a layer's attention keeps, with the inputs of its projections but the first."""
        shape, number = self.shape, self.number
        shared = self.path > self.tokens
        read = self.path if shared else self.tokens
        queries, keys = number * shape.queries * self.tokens, number * shape.keys * read
        values = keys
        if shape.fused:
            projected = number * (shape.queries + 2 * shape.keys) * self.tokens
            rotated = not shape.positions
            # Views of the projected tensor keep all of it; rotated queries and keys are new tensors.
            values = projected if not shared else keys
            queries = queries if rotated else (projected if shared else 0)
            keys = keys if rotated or shared else 0
        results = number * shape.queries * self.tokens * (1 if self.attention == "flash" else 2)
        sums = _FLOAT * shape.heads * self.tokens
        norms = {
            "": 0,
            "each": self._norm(shape.head, shape.heads + shape.kv_heads),
            "all": self._norm(shape.queries, 1) + self._norm(shape.keys, 1),
        }[shape.head_norms] * self.tokens
        return queries + keys + values + results + sums + norms + self._ranks(dense=False)

    def _dense(self) -> int:
        """Bytes a token that the dense part keeps, without its input."""
        shape = self.shape
        wide = ACTIVATIONS_KEPT.get(shape.activation, 1) + 1 + (2 if shape.gated else 0)
        return self.number * shape.inner * wide + self._ranks(dense=True) // max(1, self.tokens)

    def _sparse(self) -> int:
        """Bytes a token that the mixture of experts keeps, without its input (transformers' grouped products).

        Router: probabilities, the chosen ones, and the places of tokens in the order of experts. Experts: inputs in
        that order, gate and up, the activation, the product, and the results that the router's weights scale. Frozen
        experts keep neither their inputs nor the product.
        """
        experts = self.shape.experts
        assert experts is not None
        router = _FLOAT * experts.number + experts.chosen * (4 * _INDEX + self.number)
        inputs = 0 if self.adapters else self.shape.hidden + experts.width
        wide = inputs + 3 * experts.width + self.shape.hidden
        # The gate of the shared expert scales its result.
        kept = 4 * experts.shared + self.shape.hidden + 1 if experts.shared else 0
        return router + self.number * (experts.chosen * wide + kept)

    def _ranks(self, *, dense: bool) -> int:
        """Bytes of the adapters' inner results: of the dense part's layers, or of the attention's."""
        if not self.adapters:
            return 0
        count = (2 if self.shape.fused else 3) if dense else (2 if self.shape.fused else 4)
        count = count if self.shape.gated or not dense else 2
        return self.number * self.adapters * count * self.tokens

    @property
    def _around(self) -> int:
        """Bytes kept before the first layer and by the norm after the last."""
        shape = self.shape
        rotary = 2 * self.number * shape.head
        # A frozen embedding keeps no ids.
        places = 0 if self.adapters else _INDEX * (2 if shape.positions else 1)
        return self.tokens * (places + (0 if shape.positions else rotary) + self._norm(shape.hidden, 1))

    @property
    def _head(self) -> int:
        """Bytes kept of the scored tokens: hidden states, places, targets and, of a single piece, the logits."""
        single = self.pieces == 1
        # A frozen head does not keep its input; what is recomputed does.
        states = 0 if self.adapters and single else self.number * self.shape.hidden
        return self.scored * (states + 2 * _INDEX + (_FLOAT * self.shape.vocabulary if single else 0))
