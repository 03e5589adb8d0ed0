"""Supervised warm start: a small policy and its tokenizer, trained from scratch on scripted episodes.

The model is a Qwen2 of a few hundred thousand parameters with a byte-level BPE vocabulary in which every common word is
one token. It learns the scripted player's probabilities, not the draws from them, so every label says which actions
there are. Cross-entropy on the prompt, with a smaller weight, helps too: guessing the next name in a listing is what
teaches a small model to copy names.

Invariants
- The seed decides the weights, the order of the examples and so the result, up to the floating point of the machine.
- The folder written is an ordinary Hugging Face model folder in bfloat16.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from learner.rank.forward import Forward
from learner.rank.parity import require_exact
from learner.rank.policy import Route, load_policy
from services.config.tree import Config, WarmstartConfig, WarmstartPhase
from services.errors import ModelUnavailable
from services.model_folder import share_weights

END_OF_TEXT = "<|endoftext|>"
_PROMPT_ROWS = 4
_NUMBERED_NAME = re.compile(r" [a-z]+ \d+")
_NAME_FREQUENCY = 5


class Example(Protocol):
    """A row of token ids, and for each of them what is to be imitated there: token ids and their probabilities."""

    @property
    def tokens(self) -> list[int]: ...
    @property
    def targets(self) -> list[Mapping[int, float]]: ...


@dataclass(frozen=True, slots=True)
class FitProgress:
    """State of the training after an optimizer step. Losses in nats per token, averaged over the last steps.

    `response_loss` is the divergence KL(player ‖ policy): the player's own randomness does not count.
    """

    step: int
    tokens: int
    response_loss: float
    prompt_loss: float
    learning_rate: float


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocab_size` entries, as transformers loads it for a Qwen2 model.

    A frequent name with its number (` desk 1`) is one token, so that to name a thing is to copy one token. These are
    added tokens: transformers gives every Qwen2 model Qwen2's own splitting, which would cut them at the digits.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    texts = list(texts)
    counts = Counter(name for text in texts for name in _NUMBERED_NAME.findall(text))
    names = sorted(name for name, count in counts.items() if count >= _NAME_FREQUENCY)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size - len(names), show_progress=False)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.pad_token = tokenizer.eos_token = END_OF_TEXT
    return tokenizer


def new_model(config: WarmstartConfig, vocab_size: int, eos_token_id: int, max_tokens: int, seed: int) -> Any:
    """A randomly initialised Qwen2 of the configured shape."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=max_tokens,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
            use_cache=True,
        )
    )
    # The customary deviation of 0.02 is for wide models; in a narrow one it leaves attention flat for a long time.
    for name, parameter in model.named_parameters():
        if "embed" in name:
            torch.nn.init.normal_(parameter, std=0.03)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.9 / math.sqrt(parameter.shape[1]))
    return model


def fit(
    model: Any,
    examples: Iterable[Example],
    phase: WarmstartPhase,
    batch_tokens: int,
    on_progress: Callable[[FitProgress], None],
) -> FitProgress:
    """Train `model` in place until the examples run out or `phase.tokens` were seen; answers where it ended."""
    optimizers = _optimizers(model, phase.lr)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    model.eval()  # without dropout: what is trained is the function that is sampled
    tokens = 0
    progress = FitProgress(0, 0, math.nan, math.nan, 0.0)
    recent: list[tuple[float, float]] = []
    for step, batch in enumerate(_batches(examples, batch_tokens), start=1):
        factor = _schedule(tokens / (phase.decay_tokens or phase.tokens))
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * factor
        response_loss, astray_loss, prompt_loss = _losses(model, batch, with_prompt=phase.prompt_weight > 0)
        model.zero_grad(set_to_none=True)
        loss = response_loss + phase.astray_weight * astray_loss + phase.prompt_weight * prompt_loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        tokens += sum(len(e.tokens) for e in batch)
        recent = [*recent[-49:], (response_loss.item(), prompt_loss.item())]
        response_mean, prompt_mean = (sum(column) / len(recent) for column in zip(*recent, strict=True))
        progress = FitProgress(step, tokens, response_mean, prompt_mean, phase.lr * factor)
        on_progress(progress)
        if tokens >= phase.tokens:
            break
    return progress


def load(folder: Path, config: Config) -> Any:
    """The model of a folder, in float32.

    Raises:
        ModelUnavailable: there is none, or `fit` would not train what its own forward pass computes.
    """
    policy = load_policy(folder, "float32", temperature=1.0, route=Route(packed=False))
    parity = require_exact(policy, "rows", config.model.max_prompt_tokens + config.model.max_response_tokens)
    if not parity.route.halves or not parity.route.prefixes:
        raise ModelUnavailable(f"{folder}: the warm start cannot train {parity.architecture}: {parity.reasons[0]}")
    return policy.lm


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model (bfloat16) and its tokenizer as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
    share_weights(folder)


def _optimizers(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, biases and norms (arXiv 2502.16982)."""
    layers = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(layers, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.6 * lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _schedule(progress: float) -> float:
    """Linear warm-up over the first 2 %, cosine to a twentieth at the end."""
    if progress < 0.02:
        return max(progress / 0.02, 0.01)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _batches(examples: Iterable[Example], budget: int) -> Iterator[list[Example]]:
    """Batches of about `budget` tokens, of rows of similar length taken from a pool of 16 batches, in random order."""
    generator = torch.Generator().manual_seed(0)
    pool: list[Example] = []
    size = 0
    for example in examples:
        pool.append(example)
        size += len(example.tokens)
        if size >= 16 * budget:
            yield from _split(pool, budget, generator)
            pool, size = [], 0
    if pool:
        yield from _split(pool, budget, generator)


def _split(pool: list[Example], budget: int, generator: torch.Generator) -> Iterator[list[Example]]:
    pool.sort(key=lambda e: len(e.tokens))
    batches: list[list[Example]] = [[]]
    for example in pool:
        if batches[-1] and (len(batches[-1]) + 1) * len(example.tokens) > budget:
            batches.append([])
        batches[-1].append(example)
    for number in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[number]


def _losses(model: Any, batch: list[Example], with_prompt: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The two losses of `_divergence`, and cross-entropy of the other tokens of every fourth row.

    The third is 0 without `with_prompt`. Rows are padded on the right: with causal attention nothing real sees the
    padding.
    """
    ids = torch.zeros(len(batch), max(len(e.tokens) for e in batch), dtype=torch.long)
    imitate = torch.zeros_like(ids, dtype=torch.bool)
    prompt = torch.zeros_like(imitate)
    for number, example in enumerate(batch):
        length = len(example.tokens)
        ids[number, :length] = torch.tensor(example.tokens)
        imitate[number, 1:length] = torch.tensor([bool(wanted) for wanted in example.targets[1:]])
        prompt[number, 1:length] = ~imitate[number, 1:length] & (number % _PROMPT_ROWS == 0)
    forward = Forward(model)
    output = forward.body(ids[:, :-1])

    def logits(mask: Tensor) -> Tensor:
        return forward.head(output, output.last_hidden_state[mask[:, 1:]]).float()

    wanted = [targets for example in batch for targets in example.targets[1:] if targets]
    divergence, astray = _divergence(logits(imitate), wanted)
    if not with_prompt:
        return divergence, astray, torch.zeros(())
    total = functional.cross_entropy(logits(prompt), ids[prompt], reduction="sum")
    return divergence, astray, total / max(int(prompt.sum()), 1)


def _divergence(logits: Tensor, wanted: list[Mapping[int, float]]) -> tuple[Tensor, Tensor]:
    """Means over positions, in nats: KL(wanted ‖ softmax(logits)), and of that the part −log P(any wanted token).

    Logits [T, V]; `wanted` has T distributions. The rest of the divergence is that among the wanted tokens.
    """
    width = max((len(targets) for targets in wanted), default=1)
    tokens = torch.tensor([[*t, *[0] * (width - len(t))] for t in wanted], dtype=torch.long).view(-1, width)
    chances = torch.tensor([[*t.values(), *[0.0] * (width - len(t))] for t in wanted]).view(-1, width)
    logprobs = logits.log_softmax(dim=-1).gather(1, tokens)
    count = max(len(wanted), 1)
    divergence = (torch.xlogy(chances, chances) - chances * logprobs).sum() / count
    astray = -logprobs.masked_fill(chances == 0, -math.inf).logsumexp(dim=1).sum() / count
    return divergence, astray
