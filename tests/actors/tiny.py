"""A tiny randomly initialised Qwen2, written as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.actors.tokenizer import END, write_tokenizer

VOCABULARY = 320


def make_model(seed: int, *, tied: bool) -> Qwen2ForCausalLM:
    """A model with large random weights and biases, so that two seeds disagree by many nats."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        eos_token_id=END,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


def write_model(folder: Path, model: Qwen2ForCausalLM) -> Path:
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def weights_of(model: Qwen2ForCausalLM) -> dict[str, torch.Tensor]:
    """Tensors as a learner publishes them: a tied output head is left out."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def reference_logprobs(
    model: Qwen2ForCausalLM, prompt: list[int], response: list[int], temperature: float
) -> list[float]:
    """log_softmax(logits / T) of each response token, float32, from one forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].float() / temperature
    table = torch.log_softmax(logits, dim=-1)
    return [float(table[len(prompt) - 1 + position, token]) for position, token in enumerate(response)]
