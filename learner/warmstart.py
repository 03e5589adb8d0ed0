"""Supervised warm start: train a small policy and its tokenizer from scratch on scripted episodes.

The model is a Qwen2 of a few hundred thousand parameters with a byte-level BPE vocabulary in which every common word is
one token. It learns the scripted player's probabilities, not samples from them, so each label covers all actions.
Cross-entropy on the prompt, with a smaller weight, helps too: predicting the next name in a listing teaches a small
model to copy names.

Invariants
- The seed determines the weights and the order of the examples, and so the result, up to floating-point differences
  between machines.
- The output is an ordinary Hugging Face model folder in bfloat16.
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
CHAT_MARKERS = ("<|system|>", "<|tools|>", "<|user|>", "<|tool|>", "<|assistant|>", "<tool_call>", "</tool_call>")
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- eos_token }}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content }}
    {%- endif %}
    {%- if loop.first and tools %}
        {{- '<|tools|>' }}
        {%- for tool in tools %}
            {{- ' ' + tool.function.name }}
            {%- if tool.function.parameters and tool.function.parameters.properties %}
                {{- '(' + tool.function.parameters.properties | join(', ') + ')' }}
            {%- endif %}
            {%- if tool.function.description %}
                {{- ': ' + tool.function.description }}
            {%- endif %}
            {{- '\\n' }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
"""Chat template of a new model: a marker before each message, calls as JSON in tags, EOS after an answer. Of the tools
it writes names, parameters and descriptions, not the schemas: a small model learns the rest from its examples."""
_PROMPT_ROWS = 4
_NUMBERED_NAME = re.compile(r" [a-z]+ \d+")
_NAME_FREQUENCY = 5
_PHRASE_FREQUENCY = 50
_WORDS = re.compile(r"\w+|[^\w\s]+")


class Example(Protocol):
    """A row to imitate.

    Attributes:
        tokens: token ids of the row.
        targets: for each token, the distribution to imitate in its place, as probabilities by token id; empty: none.
    """

    @property
    def tokens(self) -> list[int]: ...
    @property
    def targets(self) -> list[Mapping[int, float]]: ...


@dataclass(frozen=True, slots=True)
class FitProgress:
    """State of the training after an optimizer step; losses are averages over the last 50 steps.

    Attributes:
        step: number of the optimizer step, from 1.
        tokens: seen so far.
        response_loss: KL(player ‖ policy), nats per token; excludes the player's own randomness.
        prompt_loss: cross-entropy of prompt tokens, nats per token.
        learning_rate: of the layers' matrices.
    """

    step: int
    tokens: int
    response_loss: float
    prompt_loss: float
    learning_rate: float


def train_tokenizer(texts: Iterable[str], vocab_size: int, chat: bool = False, phrases: int = 0) -> Any:
    """Train a byte-level BPE tokenizer of at most `vocab_size` entries, as transformers loads it for a Qwen2 model.

    A frequent name with its number (` desk 1`) is one token, so naming a thing means copying one token. These are added
    tokens, because transformers gives every Qwen2 model Qwen2's own splitting, which separates digits.

    Args:
        texts: that it has to write.
        vocab_size: most entries.
        chat: whether it gets the chat template and its markers.
        phrases: most phrases between names that become one token, those first that shorten the texts most.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    texts = list(texts)
    counts = Counter(name for text in texts for name in _NUMBERED_NAME.findall(text))
    names = sorted(name for name, count in counts.items() if count >= _NAME_FREQUENCY)
    markers = CHAT_MARKERS if chat else ()
    common = _phrases(texts, phrases) if phrases else []
    words = vocab_size - len(names) - len(common) - len(markers)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, words, show_progress=False)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*names, *common)])
    if chat:
        tokenizer.add_tokens([AddedToken(marker, normalized=False, special=True) for marker in markers])
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token = END_OF_TEXT
    return tokenizer


def _phrases(texts: Iterable[str], most: int) -> list[str]:
    """What stands between two names or line breaks again and again.

    Example: of `, go to desk 1, go to bed 1` the phrase is `, go to`.
    """
    counts = Counter(
        phrase
        for text in texts
        for line in re.split(r"(?=\n)", text)
        for phrase in _NUMBERED_NAME.split(line)
        if len(_WORDS.findall(phrase)) > 1
    )
    saved = {phrase: count * len(_WORDS.findall(phrase)) for phrase, count in counts.items()}
    often = [phrase for phrase, count in counts.items() if count >= _PHRASE_FREQUENCY]
    return sorted(sorted(often), key=lambda phrase: saved[phrase], reverse=True)[:most]


def new_model(config: WarmstartConfig, vocab_size: int, eos_token_id: int, max_tokens: int, seed: int) -> Any:
    """Initialise a Qwen2 of the configured shape at random, in float32.

    Args:
        config: shape of the model.
        vocab_size: entries of the tokenizer.
        eos_token_id: end-of-text token, also used for padding.
        max_tokens: longest row.
        seed: of the weights.
    """
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
    # The usual standard deviation of 0.02 suits wide models; in a narrow one attention stays flat for a long time.
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
    """Train `model` in place until the examples run out or `phase.tokens` were seen.

    Args:
        model: from `new_model` or `load`.
        examples: rows to imitate.
        phase: weights of the losses, learning rate and length.
        batch_tokens: about how many tokens an optimizer step takes.
        on_progress: called after each optimizer step.

    Returns:
        The state after the last optimizer step.
    """
    optimizers = _optimizers(model, phase.lr)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    model.eval()  # no dropout: the function that is trained must be the one that is sampled
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
    """Load the model of a folder in float32.

    Raises:
        ModelUnavailable: it cannot be loaded, or `fit` would train another function than its own forward pass.
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
    """Share of the peak learning rate: linear warm-up over the first 2 %, then cosine down to a twentieth."""
    if progress < 0.02:
        return max(progress / 0.02, 0.01)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _batches(examples: Iterable[Example], budget: int) -> Iterator[list[Example]]:
    """Batch rows of similar length, about `budget` tokens a batch, in random order within pools of 16 batches."""
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
    """Split a pool into batches that, padded to their longest row, take at most `budget` tokens; in random order."""
    pool.sort(key=lambda e: len(e.tokens))
    batches: list[list[Example]] = [[]]
    for example in pool:
        if batches[-1] and (len(batches[-1]) + 1) * len(example.tokens) > budget:
            batches.append([])
        batches[-1].append(example)
    for number in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[number]


def _losses(model: Any, batch: list[Example], with_prompt: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of a batch, scalars in nats per token.

    Rows are padded on the right: under causal attention no real token sees the padding.

    Args:
        model: the policy.
        batch: rows to imitate.
        with_prompt: whether to compute the third loss.

    Returns:
        The two of `_divergence`, and the cross-entropy of tokens without a target in every fourth row; 0 without
        `with_prompt`.
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
    """Divergence of the policy from the distributions to imitate, and the part of it due to unwanted tokens.

    Args:
        logits: float32 [T, V].
        wanted: T distributions, probabilities by token id.

    Returns:
        Means over the T positions, in nats: KL(wanted ‖ softmax(logits)), and −log P(any wanted token). The rest of the
        first is the divergence among the wanted tokens.

    Example: one position; the player says `left` or `right` with probability 0.5 each, the policy gives them 0.6 and
    0.2, and 0.2 to other tokens.

        divergence   0.5 ln(0.5 / 0.6) + 0.5 ln(0.5 / 0.2) = -0.09 + 0.46 = 0.37
        astray       -ln(0.6 + 0.2) = 0.22
    """
    width = max((len(targets) for targets in wanted), default=1)
    tokens = torch.tensor([[*t, *[0] * (width - len(t))] for t in wanted], dtype=torch.long).view(-1, width)
    chances = torch.tensor([[*t.values(), *[0.0] * (width - len(t))] for t in wanted]).view(-1, width)
    logprobs = logits.log_softmax(dim=-1).gather(1, tokens)
    count = max(len(wanted), 1)
    divergence = (torch.xlogy(chances, chances) - chances * logprobs).sum() / count
    astray = -logprobs.masked_fill(chances == 0, -math.inf).logsumexp(dim=1).sum() / count
    return divergence, astray
