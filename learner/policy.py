"""A Hugging Face causal language model as a policy: log-probabilities of response tokens, and nothing else.

Invariants
- Only the positions that predict response tokens reach the vocabulary projection: prompts cost no logits.
- The head is called equally often on all ranks, whatever each has to score: sharded, it takes a collective each time.
- Log-probabilities are those of the sampling distribution, logits / temperature, in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learner.attention import Layout, register
from services.errors import ModelUnavailable
from services.model_folder import check_model_folder

LOGITS_PER_MIB = 2**18
MAX_LOGITS = 256 * LOGITS_PER_MIB
"""Most logits held at once; more positions are done in pieces that are recomputed in the backward pass."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Policy(nn.Module):
    """`forward` answers (log-probability, entropy), float32 [T] each.

    Parameters keep their Hugging Face names below the prefix `lm.`.
    """

    def __init__(self, lm: Any, temperature: float, max_logits: int = MAX_LOGITS) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature
        self.max_logits = max_logits

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
            input_ids: int64 [1, L], a line of sequences. position_ids: int64 [1, L], places in their own sequences.
            positions: int64 [T], place in the line of the token that predicts each target.
            targets: int64 [T].
            layout: where the sequences lie.
            widest: the largest T of this call on all ranks.
            entropy_gradient: let the entropy carry a gradient.
        """
        body = self.lm.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, layout=layout)
        hidden = body.last_hidden_state[0, positions]
        head = self.lm.get_output_embeddings()
        pieces = -(-widest // max(1, self.max_logits // self.lm.config.vocab_size))
        if pieces <= 1:
            return self._score(head, hidden, targets, entropy_gradient)
        parts = [
            checkpoint(self._score, head, some, wanted, entropy_gradient, use_reentrant=False)
            for some, wanted in zip(hidden.tensor_split(pieces), targets.tensor_split(pieces), strict=True)
        ]
        logprob, entropy = zip(*parts, strict=True)
        return torch.cat(logprob), torch.cat(entropy)

    def _score(self, head: nn.Module, hidden: Tensor, targets: Tensor, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        logs = (head(hidden).float() / self.temperature).log_softmax(dim=-1)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = -(logs.exp() * logs).sum(dim=-1)
        return logs.gather(1, targets[:, None])[:, 0], entropy


def load_policy(folder: Path, dtype: str, temperature: float, max_logits: int = MAX_LOGITS) -> Policy:
    """The model in `folder` as a policy.

    Raises:
        ModelUnavailable: the folder holds no model that can be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_model_folder(folder)
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation=register(), local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelUnavailable(f"model.path: cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    return Policy(lm, temperature, max_logits)
