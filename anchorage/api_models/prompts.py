"""The run's prompts for models whose tokenizer is elsewhere: the texts that a local policy reads, cut where its are.

Lengths are counted with the tokenizer in `model.path`, so that an API model reads exactly what the run's own policy
reads. Where there is none, they are estimated: `BYTES_PER_TOKEN` bytes are a token.

Invariants
- Neither torch nor an engine is imported: transformers' tokenizer on its own needs none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.prompts import Prompt, PromptBuilder
from actors.templates import History
from env_servers.protocol import StepResult
from services.config.tree import Config
from services.errors import ModelUnavailable
from services.model_folder import check_tokenizer

BYTES_PER_TOKEN = 4


class ApiPrompts(PromptBuilder):
    """Builds a run's prompts for an API model, which writes its responses from their first character on.

    Raises:
        PluginError: as `PromptBuilder`.
    """

    def __init__(self, config: Config) -> None:
        tokenizer = load_counter(config.model.path)
        try:
            super().__init__(config.prompt, tokenizer, config.model.max_prompt_tokens)
        except ModelUnavailable:  # of the folder's own chat template, which an API model does not need
            tokenizer = EstimatingTokenizer()
            super().__init__(config.prompt, tokenizer, config.model.max_prompt_tokens)
        self._end = tokenizer.eos_token_id
        self.of_text_template = self._template.transcript is None

    def build(self, goal: str | None, history: History, result: StepResult) -> Prompt:
        """As `PromptBuilder.build`, without the beginning of a response."""
        return replace(super().build(goal, history, result), begun="")

    def length_of(self, response: str, *, finished: bool) -> list[int]:
        """The ids of a response, as a local policy would have sampled them."""
        end = [self._end] if finished and self._end is not None else []
        return [*self._tokens.encode(response), *end]

    def as_text(self, prompt: Prompt) -> str:
        """The text that a local policy continues, control tokens and all; without the tokenizer's prefix, such as BOS,
        which a server adds itself."""
        if isinstance(self._tokenizer, EstimatingTokenizer):
            return prompt.text
        prefix = self._tokens.prefix
        ids = prompt.ids[len(prefix) :] if tuple(prompt.ids[: len(prefix)]) == prefix else prompt.ids
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class EstimatingTokenizer:
    """Counts where there is no tokenizer: ids without a meaning, one for `BYTES_PER_TOKEN` bytes."""

    eos_token_id: int | None = None
    chat_template: str | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        return [0] * -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)


def load_counter(folder: Path) -> Any:
    """The tokenizer of a model's folder; an `EstimatingTokenizer` where there is none that can be loaded alone."""
    try:
        check_tokenizer(folder)
        # Not AutoTokenizer, which imports torch.
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        return TokenizersBackend.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception:  # whatever files of somebody else's end in, or an installation without transformers
        return EstimatingTokenizer()
