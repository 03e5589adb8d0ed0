"""Builder of tiny random models in two sizes, in which a wrong weight or a dropped factor shows.

Weights of matrices have a standard deviation of 0.15, and biases, sinks and the like a larger one: with the usual 0.02
a layer hardly attends to anything, and an error is as small as rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from tests.actors.tokenizer import END

WEIGHT = 0.15
BIASES = ("bias", "sink")
BUFFERS = ("e_score_correction_bias",)


@dataclass(frozen=True)
class Size:
    """What models of one size have in common.

    Attributes:
        vocabulary: number of token ids.
        width: hidden size.
        intermediate: width of the dense layers.
        heads: number of attention heads.
        kv_heads: number of key and value heads.
        positions: longest row.
        begin: id of the token that begins a text; None: there is none.
        end: id of the token that ends a text, and of padding.
    """

    vocabulary: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    positions: int
    begin: int | None
    end: int

    @property
    def shape(self) -> dict[str, Any]:
        """Settings of a configuration, by the names that most architectures give them."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": 2,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.width // self.heads,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": True,
            **self.tokens,
        }

    @property
    def tokens(self) -> dict[str, int | None]:
        """Ids of special tokens."""
        return {"bos_token_id": self.begin, "eos_token_id": self.end, "pad_token_id": self.end}

    def like(self, name: str, **more: Any) -> Callable[[], Any]:
        """Maker of the configuration `name` of transformers, in this shape."""
        return lambda: getattr(transformers, name)(**{**self.shape, **more})

    def only(self, name: str, **more: Any) -> Callable[[], Any]:
        """The same for a configuration with names of its own: only vocabulary and special tokens are set."""
        return lambda: getattr(transformers, name)(**{"vocab_size": self.vocabulary, **self.tokens, **more})


SMALL = Size(vocabulary=96, width=32, intermediate=48, heads=4, kv_heads=2, positions=160, begin=0, end=0)
SERVED = Size(vocabulary=320, width=64, intermediate=96, heads=2, kv_heads=1, positions=512, begin=None, end=END)
"""Has heads of 32, the smallest that vLLM runs on a CPU, and the vocabulary of the tests' tokenizer."""


def random_model(config: Any, *, seed: int = 1, bias: float = 0.5) -> Any:
    """A causal language model in float32 and evaluation mode, with weights that matter.

    Args:
        config: of transformers.
        seed: of the weights.
        bias: standard deviation of biases, sinks and correction biases.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "A_log" not in name:
                parameter.normal_(0, WEIGHT)
            elif any(kind in name for kind in BIASES):
                parameter.normal_(0, bias)
        for name, buffer in model.named_buffers():
            if name.endswith(BUFFERS):
                buffer.normal_(0, bias)
    return model
