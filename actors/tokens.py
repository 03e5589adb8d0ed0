"""Convert text to token ids and back, so that text from an environment never becomes a control token.

A tokenizer converts `<|im_end|>` to the control token wherever it occurs, also in an observation. Here that happens
only in the project's own text and in the chat template: foreign text goes through `escape` first, and `encode` then
makes ordinary tokens of the same characters.

Method: `encode` uses a copy of the tokenizer in which each control token has a random name that no text contains. In
the prompt's own text control tokens are replaced by these names; in escaped text they keep their own, which the copy
does not know. All else (normalisation, words, merges, other added tokens) is the tokenizer's, in one call for the whole
text: the ids of text without control tokens are unchanged.

Example: an observation says `bye<|im_end|>`, and the prompt ends with a real `<|im_end|>`.

    escape      bye<|im_end|>                    ->  byezq1fm3e7qz
    prompt      byezq1fm3e7qz<|im_end|>              what the chat template makes of it
    encode 1    byezq1fm3e7qzzq1fm3m7qz              own control tokens get their secret names
    encode 2    bye<|im_end|>zq1fm3m7qz              escaped ones get their own text back
    copy        bye < | im _ end | > and 7           ordinary tokens, then the control token with id 7

Control tokens are the special tokens, those that the chat template writes, and markup such as `<tool_call>` that was
added to the vocabulary. Added tokens that are words remain words.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.errors import ModelUnavailable

_MARKUP = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # byte tokens, with which sentencepiece models spell unknown characters
_SIGNS = re.compile(r"[<>\[\]{}|｜▁]")


class PromptTokens:
    """One tokenizer.

    Args:
        tokenizer: as transformers loads it.

    Attributes:
        prefix: ids that the tokenizer puts at the beginning of a text, such as BOS.
        known: whether its control tokens can be identified, as in transformers' fast and Python tokenizers. Others are
            used as they are: mistral-common's never converts text to control tokens.

    Raises:
        ModelUnavailable: its control tokens cannot be renamed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.known = _is_known(tokenizer)
        nonce = secrets.token_hex(6)
        control = _control_tokens(tokenizer)
        self._names = {token: f"zq{nonce}m{id}qz" for token, id in control.items()}
        self._escapes = {token: f"zq{nonce}e{id}qz" for token, id in control.items()}
        self._originals = {name: token for token, name in self._escapes.items()}
        self._control = _any_of(control)
        self._escaped = re.compile(f"zq{nonce}e[0-9]+qz")
        self._encode = _encoder(tokenizer, self._names)
        self.prefix = _prefix(tokenizer)

    def escape(self, text: str) -> str:
        """Protect foreign text: `encode` will make ordinary tokens of the control tokens in it."""
        if self._control is None:
            return text
        return self._control.sub(lambda found: self._escapes[found.group()], text)

    def unescape(self, text: str) -> str:
        """Undo `escape`, in any text that contains escaped text."""
        return self._escaped.sub(lambda found: self._originals[found.group()], text) if self._escapes else text

    def escapes(self, text: str) -> int:
        """How many control tokens of foreign text are escaped in a text."""
        return len(self._escaped.findall(text))

    def control_at(self, text: str) -> int:
        """Where the first control token of a text begins that is not escaped; -1 if there is none."""
        found = None if self._control is None else self._control.search(text)
        return -1 if found is None else found.start()

    def control(self, text: str) -> str:
        """The control token that a text begins with; empty if there is none."""
        found = None if self._control is None else self._control.match(text)
        return "" if found is None else found.group()

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, with its control tokens except those in escaped parts. Adds no prefix."""
        if self._control is not None:
            text = self._control.sub(lambda found: self._names[found.group()], text)
        return self._encode(self.unescape(text))

    def begin(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Ids of a whole prompt: adds the tokenizer's prefix unless they begin with it."""
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids


def decode_response(tokenizer: Any, ids: Sequence[int], finished: bool) -> str:
    """Decode a sampled response, without its end.

    Special tokens stay, because in some tokenizers `<think>` and `<action>` are special. EOS and padding are left out,
    and the token that ended the response. Spaces are not cleaned up.

    Args:
        tokenizer: of the policy.
        ids: sampled tokens.
        finished: whether the response ended by itself, with its last token.
    """
    silent = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    said = [token for token in (ids[:-1] if finished else ids) if token not in silent]
    options = {"spaces_between_special_tokens": False} if hasattr(tokenizer, "tokens_trie") else {}
    text: str = tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False, **options)
    return text


def _is_known(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "backend_tokenizer") or hasattr(tokenizer, "tokens_trie")


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of the control tokens by their text, see the module."""
    if not _is_known(tokenizer):
        return {}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    trained, named = tokenizer.vocab_size, set(tokenizer.all_special_tokens)
    control = {}
    for id, token in tokenizer.added_tokens_decoder.items():
        content = str(token.content)
        special = token.special or content in named
        special = special and (id >= trained or _SIGNS.search(content))  # a "!" that serves as padding stays text
        markup = _MARKUP.fullmatch(content) and (id >= trained or content in template)
        if content.strip() and (special or markup) and not _BYTE.fullmatch(content):
            control[content] = int(id)
    return control


def _any_of(texts: Mapping[str, int]) -> re.Pattern[str] | None:
    """A pattern that finds any of the texts, the longest first, as a tokenizer does; None if there are none."""
    if not texts:
        return None
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _encoder(tokenizer: Any, names: Mapping[str, str]) -> Callable[[str], tuple[int, ...]]:
    """A function from text to ids, for which the control tokens have these names."""
    if not _is_known(tokenizer):
        return lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    renamed = _renamed_python(tokenizer, names) if backend is None else _renamed_backend(backend, names)

    def encode(text: str) -> tuple[int, ...]:
        try:
            ids = renamed.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError):  # an unpaired surrogate, which no token represents
            ids = renamed.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)
        return tuple(ids if backend is None else ids.ids)

    return encode


def _renamed_backend(backend: Any, names: Mapping[str, str]) -> Any:
    """Copy a `tokenizers.Tokenizer`, with other names and the same ids for its control tokens."""
    from tokenizers import Tokenizer

    tree = json.loads(backend.to_str())
    tree |= {"truncation": None, "padding": None, "post_processor": None}
    for token in tree["added_tokens"]:
        if token["content"] in names:
            token["content"] = names[token["content"]]
    model = tree["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): id for token, id in vocabulary.items()}
    elif vocabulary is not None:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    # Without this, merges could still assemble a control token's id from the characters of escaped text.
    if isinstance(model.get("merges"), list):
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]
    if isinstance(model.get("unk_token"), str) and model["unk_token"] in names:
        model["unk_token"] = names[model["unk_token"]]
    renamed = Tokenizer.from_str(json.dumps(tree))
    wrong = [token for token, name in names.items() if renamed.token_to_id(name) != backend.token_to_id(token)]
    if wrong:
        raise ModelUnavailable(f"the tokenizer's control tokens {', '.join(sorted(wrong))} cannot be told from text")
    return renamed


def _makes(merge: str | list[str], names: Mapping[str, str]) -> bool:
    """Whether a merge of a BPE vocabulary produces a control token or consumes one."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _renamed_python(tokenizer: Any, names: Mapping[str, str]) -> Any:
    """As `_renamed_backend`, for a tokenizer written in Python or wrapping sentencepiece."""
    from tokenizers import AddedToken
    from transformers.tokenization_python import Trie

    renamed = copy.deepcopy(tokenizer)
    tokens = {}
    for id, token in tokenizer.added_tokens_decoder.items():
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        tokens[id] = AddedToken(names.get(token.content, token.content), **flags)
    renamed._added_tokens_decoder = tokens
    renamed._added_tokens_encoder = {token.content: id for id, token in tokens.items()}
    # Not by `_update_trie`: sentencepiece's also adds all special tokens by their old names.
    renamed.tokens_trie = Trie()
    for token in tokens.values():
        renamed.tokens_trie.add(token.content)
    # The unknown token keeps its name: sentencepiece's tokenizers prepend it to texts and count its pieces.
    special = renamed._special_tokens_map
    renamed._special_tokens_map = {
        name: names.get(str(token), token) if name != "unk_token" else token for name, token in special.items()
    }
    return renamed


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer puts before a text by itself."""
    if not _is_known(tokenizer):
        return ()
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    for length in range(len(whole) - len(bare) + 1):
        if whole[length : length + len(bare)] == bare:
            return tuple(whole[:length])
    return ()
