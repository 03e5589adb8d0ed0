"""Text to token ids and back, so that what an environment says is never a control token.

A tokenizer reads `<|im_end|>` as the control token wherever it stands, also in an observation. Here it does so only in
text of our own and of the chat template: texts of others go through `escape` first, and `encode` then makes ordinary
tokens of the same characters.

How: `encode` works on a copy of the tokenizer in which each control token has another name that no text holds. In the
prompt's own text the control tokens get that name; in escaped text they keep theirs, which means nothing to the copy.
Everything else (normalisation, words, merges, other added tokens) is the tokenizer's own, in one call for the whole
text: for text without control tokens the ids are those of the tokenizer.

Control tokens are the special ones, those that the chat template writes, and markup such as `<tool_call>` that was
added to the vocabulary. Added tokens that are words stay words.
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
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # what sentencepiece's models spell unknown characters with
_SIGNS = re.compile(r"[<>\[\]{}|｜▁]")


class PromptTokens:
    """One tokenizer. `prefix`: the ids that it wants at the beginning of a text, such as BOS.

    `known`: its control tokens can be told, as of those of transformers that are fast or written in Python. Others are
    used as they are: mistral-common's makes no control tokens of text anyway.

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
        """Text of somebody else's, for `encode`: no control token in it will be one."""
        if self._control is None:
            return text
        return self._control.sub(lambda found: self._escapes[found.group()], text)

    def unescape(self, text: str) -> str:
        return self._escaped.sub(lambda found: self._originals[found.group()], text) if self._escapes else text

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, control tokens and all, but for what was escaped in it. Nothing is added."""
        if self._control is not None:
            text = self._control.sub(lambda found: self._names[found.group()], text)
        return self._encode(self.unescape(text))

    def begin(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The ids of a whole prompt, with the tokenizer's prefix before them unless they begin with it."""
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids


def decode_response(tokenizer: Any, ids: Sequence[int], finished: bool) -> str:
    """The text of a sampled response, with all that it says but its end.

    Special tokens stay: with some tokenizers `<think>` and `<action>` are such. EOS and padding are left out, and of a
    response that `finished` by itself the token that ended it. No space is tidied up.
    """
    silent = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    said = [token for token in (ids[:-1] if finished else ids) if token not in silent]
    options = {"spaces_between_special_tokens": False} if hasattr(tokenizer, "tokens_trie") else {}
    text: str = tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False, **options)
    return text


def _is_known(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "backend_tokenizer") or hasattr(tokenizer, "tokens_trie")


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """Control tokens and their ids; see the module."""
    if not _is_known(tokenizer):
        return {}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    trained, named = tokenizer.vocab_size, set(tokenizer.all_special_tokens)
    control = {}
    for id, token in tokenizer.added_tokens_decoder.items():
        content = str(token.content)
        special = token.special or content in named
        special = special and (id >= trained or _SIGNS.search(content))  # "!" as padding is a "!" all the same
        markup = _MARKUP.fullmatch(content) and (id >= trained or content in template)
        if content.strip() and (special or markup) and not _BYTE.fullmatch(content):
            control[content] = int(id)
    return control


def _any_of(texts: Mapping[str, int]) -> re.Pattern[str] | None:
    """Finds the first of the texts, and of several the longest, as a tokenizer does."""
    if not texts:
        return None
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _encoder(tokenizer: Any, names: Mapping[str, str]) -> Callable[[str], tuple[int, ...]]:
    """A function from text to ids in which the control tokens have these names."""
    if not _is_known(tokenizer):
        return lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    renamed = _renamed_python(tokenizer, names) if backend is None else _renamed_backend(backend, names)

    def encode(text: str) -> tuple[int, ...]:
        try:
            ids = renamed.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError):  # half a surrogate pair, which no token stands for
            ids = renamed.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)
        return tuple(ids if backend is None else ids.ids)

    return encode


def _renamed_backend(backend: Any, names: Mapping[str, str]) -> Any:
    """A copy of a `tokenizers.Tokenizer` whose control tokens are called otherwise, with the same ids."""
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
    """Whether a merge of a BPE vocabulary makes one of the control tokens, or is made of one."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _renamed_python(tokenizer: Any, names: Mapping[str, str]) -> Any:
    """The same of a tokenizer that is written in Python, or wraps sentencepiece."""
    from tokenizers import AddedToken
    from transformers.tokenization_python import Trie

    renamed = copy.deepcopy(tokenizer)
    tokens = {}
    for id, token in tokenizer.added_tokens_decoder.items():
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        tokens[id] = AddedToken(names.get(token.content, token.content), **flags)
    renamed._added_tokens_decoder = tokens
    renamed._added_tokens_encoder = {token.content: id for id, token in tokens.items()}
    # By hand, not by `_update_trie`: that of sentencepiece's adds all special tokens by their old names too.
    renamed.tokens_trie = Trie()
    for token in tokens.values():
        renamed.tokens_trie.add(token.content)
    # The name of the unknown token stays: sentencepiece's tokenizers put it before texts and count its pieces.
    special = renamed._special_tokens_map
    renamed._special_tokens_map = {
        name: names.get(str(token), token) if name != "unk_token" else token for name, token in special.items()
    }
    return renamed


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text by itself."""
    if not _is_known(tokenizer):
        return ()
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    for length in range(len(whole) - len(bare) + 1):
        if whole[length : length + len(bare)] == bare:
            return tuple(whole[:length])
    return ()
