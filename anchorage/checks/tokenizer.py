"""Compares a model folder's tokenizer with its model, from the files alone; transformers is not imported.

Invariants
- A `problem` makes prompts or responses wrong; a `note` is worth knowing.
- Only what is certain is a problem. What the files do not say is left to the code that loads the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.errors import ModelUnavailable
from services.model_folder import check_tokenizer


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        value: what was found, a few words.
        verdict: `ok`; `note`: worth knowing; `problem`: wrong; `skipped`: not checked.
        line: for a note or a problem, one line: what is wrong, with the value; then what to do.
    """

    name: str
    value: str
    verdict: Literal["ok", "note", "problem", "skipped"] = "ok"
    line: str = ""


def tokenizer_problems(folder: Path) -> Iterator[str]:
    """Yield a line for each problem of the folder's tokenizer."""
    return (finding.line for finding in tokenizer_findings(folder) if finding.verdict == "problem")


def tokenizer_findings(folder: Path) -> list[Finding]:
    """Check the vocabulary against the embedding rows, the special tokens and the chat template."""
    try:
        check_tokenizer(folder)
    except ModelUnavailable as error:
        return [Finding("tokenizer", "cannot be loaded", "problem", str(error))]
    model, settings = _read(folder / "config.json"), _read(folder / "tokenizer_config.json")
    nested = model.get("text_config")
    text = nested if isinstance(nested, dict) else model
    ids = _ids(folder)
    return [
        _rows(folder, text, ids),
        _end(folder, text, settings, ids),
        _beginning(settings),
        _padding(settings),
        _template(folder, settings),
    ]


def _rows(folder: Path, text: Mapping[str, Any], ids: Mapping[str, int]) -> Finding:
    rows, largest = text.get("vocab_size"), max(ids.values(), default=None)
    if not isinstance(rows, int) or largest is None:
        return Finding("tokens", "not in the files", "skipped")
    value = f"{largest + 1} tokens, {rows} embedding rows"
    if largest < rows:
        return Finding("tokens", value)
    name = next(name for name, number in ids.items() if number == largest)
    line = (
        f"the tokenizer in {folder} has {largest + 1} tokens (the last is {name!r}), the model {rows} embedding rows: "
        "it is another model's tokenizer, or the embeddings were not resized"
    )
    return Finding("tokens", value, "problem", line)


def _end(folder: Path, text: Mapping[str, Any], settings: Mapping[str, Any], ids: Mapping[str, int]) -> Finding:
    token = _token(settings, "eos_token")
    if token is None:
        line = f"the tokenizer in {folder} has no eos_token: no response would end before the token limit; name one"
        return Finding("EOS", "missing", "problem", f"{line} in tokenizer_config.json") if settings else _unknown("EOS")
    number = ids.get(token)
    if ids and number is None:
        line = f"the tokenizer in {folder} does not contain its own eos_token {token!r}: no response would end"
        return Finding("EOS", repr(token), "problem", line)
    of_model = text.get("eos_token_id")
    known = of_model if isinstance(of_model, list) else [of_model]
    if number is not None and of_model is not None and number not in known:
        line = f"responses end with the tokenizer's {token!r} ({number}); config.json has eos_token_id={of_model}"
        return Finding("EOS", f"{token!r} ({number})", "note", line)
    return Finding("EOS", f"{token!r} ({number})" if number is not None else repr(token))


def _beginning(settings: Mapping[str, Any]) -> Finding:
    token = _token(settings, "bos_token")
    added = settings.get("add_bos_token")
    return Finding("BOS", "none" if token is None else f"{token!r}{', added to prompts' if added else ''}")


def _padding(settings: Mapping[str, Any]) -> Finding:
    return Finding("pad", f"{_token(settings, 'pad_token')!r}, not used: rows are not padded")


def _template(folder: Path, settings: Mapping[str, Any]) -> Finding:
    there = bool(settings.get("chat_template")) or (folder / "chat_template.jinja").is_file()
    if there:
        return Finding("chat template", "present")
    line = "the tokenizer has no chat template: `think` prompts are plain text, as for a base model"
    return Finding("chat template", "none", "note", line)


def _ids(folder: Path) -> dict[str, int]:
    """Return the ids of all tokens, added ones included; empty without a tokenizer.json."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True) if file.is_file() else {}


def _token(settings: Mapping[str, Any], name: str) -> str | None:
    token = settings.get(name)
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _unknown(name: str) -> Finding:
    return Finding(name, "not in the files", "skipped")


def _read(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
