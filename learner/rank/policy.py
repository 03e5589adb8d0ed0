"""A Hugging Face causal language model as a policy: log-probabilities of response tokens.

Rows take one of three routes: lines of packed sequences, each sequence alone through body and head, or each alone
through the undivided forward pass. A route is used only for models for which it computes the model's own function, as
measured by `learner.rank.parity`.

Invariants
- Only positions that predict response tokens reach the vocabulary projection: prompts cost no logits.
- The head is called equally often on all ranks, whatever each has to score: if it is sharded, each call is collective.
- Log-probabilities are those of the sampling distribution, logits / temperature, in float32.
- The model is always in evaluation mode: the function that is trained is the one that is sampled, without dropout or
  noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learner.batching import MicroBatch, Sharing
from learner.rank.attention import Layout, PackingUnsupported, register
from learner.rank.forward import Forward
from services.errors import ModelUnavailable
from services.model_folder import check_model_folder

LOGITS_PER_MIB = 2**18
MAX_LOGITS = 256 * LOGITS_PER_MIB
"""Most logits held at once; more positions are scored in pieces, which the backward pass recomputes."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Route:
    """How rows go through the model.

    Attributes:
        packed: lines of many sequences that share prefixes; else each sequence alone.
        halves: the body once, and the head on selected positions; else the undivided forward pass.
        prefixes: rows that are prefixes of another row use its sequence; else each row is a sequence.
    """

    packed: bool = True
    halves: bool = True
    prefixes: bool = True

    @property
    def sharing(self) -> Sharing:
        """What rows may share in `learner.batching.plan`."""
        if self.packed:
            return "lines"
        return "prefixes" if self.prefixes else "nothing"


class Policy(nn.Module):
    """Scores response tokens with a causal language model.

    Parameters keep their Hugging Face names below the prefix `lm.`.

    Args:
        lm: a causal language model of transformers.
        temperature: of sampling.
        max_logits: most logits held at once.
        route: that rows take; None: `Route()`, packed lines.

    Raises:
        PackingUnsupported: `route` is packed and the model takes no attention function.
    """

    def __init__(self, lm: Any, temperature: float, max_logits: int = MAX_LOGITS, route: Route | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature
        self.max_logits = max_logits
        self._own_attention = lm.config._attn_implementation
        self._forward = Forward(lm)
        self._route = Route(packed=False)
        self.train()
        self.route = route or Route()

    @property
    def route(self) -> Route:
        """The route that rows take; may be changed at any time."""
        return self._route

    @route.setter
    def route(self, route: Route) -> None:
        if route.packed != self._route.packed:
            _set_attention(self.lm, register() if route.packed else self._own_attention)
        self._route = route

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module only: dropout, router noise and the like in the model stay off."""
        super().train(mode)
        self.lm.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        layout: Layout,
        widest: int,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Score T tokens.

        Args:
            input_ids: int64 [1, L], a line of sequences.
            position_ids: int64 [1, L], position of each token in its own sequence.
            positions: int64 [T], place in the line of the token that predicts each target.
            targets: int64 [T].
            layout: where the sequences lie.
            widest: largest T of this call over all ranks.
            entropy_gradient: whether the entropy carries a gradient.

        Returns:
            Log-probability of each target and entropy of its distribution, in nats: float32 [T] each.
        """
        if not self._route.halves:
            logits = torch.cat([own[0] for own in self._alone(self._forward.whole, input_ids, layout)])
            return self._score(lambda chosen: chosen, logits[positions], targets, entropy_gradient)
        if self._route.packed:
            output = self._forward.body(input_ids, position_ids=position_ids, layout=layout)
            line = output.last_hidden_state[0]
        else:
            outputs: list[Any] = []
            line = torch.cat([own[0] for own in self._alone(self._body_keeping(outputs), input_ids, layout)])
            (output,) = outputs
        hidden = line[positions]

        def head(some: Tensor) -> Tensor:
            return self._forward.head(output, some)

        # By `widest`, not by T: all ranks must call a sharded head equally often.
        pieces = -(-widest // max(1, self.max_logits // self._forward.vocabulary))
        if pieces <= 1:
            return self._score(head, hidden, targets, entropy_gradient)
        parts = [
            checkpoint(self._score, head, some, wanted, entropy_gradient, use_reentrant=False)
            for some, wanted in zip(hidden.tensor_split(pieces), targets.tensor_split(pieces), strict=True)
        ]
        logprob, entropy = zip(*parts, strict=True)
        return torch.cat(logprob), torch.cat(entropy)

    def _alone(self, run: Callable[[Tensor], Tensor], input_ids: Tensor, layout: Layout) -> list[Tensor]:
        """Call `run` on each sequence of the line alone; keep of each result [1, P, N] the sequence's own tokens."""
        parts = []
        for (start, end), (first, last) in zip(pairwise(layout.bounds), pairwise(layout.path_bounds), strict=True):
            tokens = input_ids[:, start:end] if layout.path is None else input_ids[:, layout.path[first:last]]
            parts.append(run(tokens)[:, start - end :])
        return parts

    def _body_keeping(self, outputs: list[Any]) -> Callable[[Tensor], Tensor]:
        """A function from tokens to hidden states; keeps one output of the body in `outputs`, for the head."""

        def run(tokens: Tensor) -> Tensor:
            outputs[:] = [self._forward.body(tokens)]
            hidden: Tensor = outputs[0].last_hidden_state
            return hidden

        return run

    def _score(
        self, head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each target and entropy, float32 [T] each, from hidden states [T, H]."""
        logs = (head(hidden).float() / self.temperature).log_softmax(dim=-1)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = -(logs.exp() * logs).sum(dim=-1)
        return logs.gather(1, targets[:, None])[:, 0], entropy


def _set_attention(lm: Any, name: str) -> None:
    """Set the attention function of all layers by name. Raises PackingUnsupported if the model does not allow it."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers only logs that it cannot be set; below that is an error
    try:
        lm.set_attn_implementation(name)
    finally:
        logging.set_verbosity(verbosity)
    if lm.config._attn_implementation != name:
        raise PackingUnsupported("it does not accept an attention function")


def load_policy(
    folder: Path, dtype: str, temperature: float, max_logits: int = MAX_LOGITS, route: Route | None = None
) -> Policy:
    """Load the model in a folder as a policy, on the CPU.

    Args:
        folder: a Hugging Face model folder.
        dtype: `float32` or `bfloat16`.
        temperature: of sampling.
        max_logits: most logits held at once.
        route: that rows take; None: packed lines.

    Raises:
        ModelUnavailable: the model cannot be loaded, or its weights are incomplete.
        PackingUnsupported: `route` is packed, and the model does not accept an attention function.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_model_folder(folder)
    # Code in the folder is not run. Without this setting transformers would prompt at the terminal.
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        # AutoModelForCausalLM would silently load the decoder alone.
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{config.model_type} is an encoder-decoder model; take a causal language model")
        lm, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], output_loading_info=True, ignore_mismatched_sizes=True, **local
        )
    except Exception as error:  # depends on the configuration and the files
        raise ModelUnavailable(f"model.path: cannot load {folder}: {_cause(error)}") from error
    if loading["mismatched_keys"]:
        name, stored, wanted = min(loading["mismatched_keys"])
        raise ModelUnavailable(
            f"model.path {folder}: {name} has shape {tuple(stored)} in the weights files and {tuple(wanted)} in "
            "config.json, which belongs to another model"
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelUnavailable(f"model.path {folder}: the weights files lack {some}, which would be random numbers")
    return Policy(lm, temperature, max_logits, route)


def _cause(error: Exception) -> str:
    """The error as one line. A KeyError and the like name only the missing thing, so their type is added."""
    if "trust_remote_code" in str(error):
        return "the model needs code from its own folder, which is not run; use an architecture built into transformers"
    told = " ".join(str(error).split())[:300]
    return told if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {told}"


def inputs(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Layout, int]:
    """Arguments of `Policy.forward` for a micro-batch, on a device."""
    arrays = (batch.input_ids, batch.position_ids, batch.positions, batch.targets)
    first, second, third, fourth = (torch.tensor(array, device=device) for array in arrays)
    layout = Layout.of(batch.starts, batch.path_starts, batch.path, device)
    return first, second, third, fourth, layout, batch.widest
