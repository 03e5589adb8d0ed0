"""A Hugging Face causal language model as a policy: log-probabilities of response tokens, and nothing else.

Invariants
- Only the positions that predict response tokens reach the vocabulary projection: prompts cost no logits.
- Log-probabilities are those of the sampling distribution, logits / temperature, in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from services.errors import ModelUnavailable
from services.model_folder import check_model_folder

MAX_LOGITS = 2**26
"""Most logits held at once; more positions are done in pieces that are recomputed in the backward pass."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Policy(nn.Module):
    """`forward` answers (log-probability, entropy), float32 [T] each.

    Parameters keep their Hugging Face names below the prefix `lm.`.
    """

    def __init__(self, lm: Any, temperature: float) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature

    def forward(
        self, input_ids: Tensor, positions: Tensor, targets: Tensor, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Score T tokens.

        Args:
            input_ids: int64 [B, L], right-padded (no mask is needed: nothing real attends to what follows it).
            positions: int64 [T], index into [B · L] of the position that predicts each token.
            targets: int64 [T].
            entropy_gradient: let the entropy carry a gradient.
        """
        hidden = self.lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[positions]
        head = self.lm.get_output_embeddings()
        piece = max(1, MAX_LOGITS // self.lm.config.vocab_size)
        if len(targets) <= piece:
            return self._score(head, hidden, targets, entropy_gradient)
        parts = [
            checkpoint(self._score, head, some, wanted, entropy_gradient, use_reentrant=False)
            for some, wanted in zip(torch.split(hidden, piece), torch.split(targets, piece), strict=True)
        ]
        logprob, entropy = zip(*parts, strict=True)
        return torch.cat(logprob), torch.cat(entropy)

    def _score(self, head: nn.Module, hidden: Tensor, targets: Tensor, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float() / self.temperature
        logprob = -nn.functional.cross_entropy(logits, targets, reduction="none")
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            logs = logits.log_softmax(dim=-1)
            entropy = -(logs.exp() * logs).sum(dim=-1)
        return logprob, entropy


def load_policy(folder: Path, dtype: str, temperature: float) -> Policy:
    """The model in `folder` as a policy.

    Raises:
        ModelUnavailable: the folder holds no model that can be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_model_folder(folder)
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelUnavailable(f"model.path: cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    return Policy(lm, temperature)
