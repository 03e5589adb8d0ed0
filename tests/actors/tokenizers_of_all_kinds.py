"""Small tokenizers of the kinds that models have: by what they split, space marks, where control tokens are."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

CORPUS = [
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a desk 2 and a bed 1.",
    "Your task is to: put a pen on the desk. go to desk 1, take pen 2 from desk 1, open drawer 3, look, inventory",
    "print(\"hello\") if a < b else {'key': [1, 2]} # <html><b>im_end</b></html> start <|end|> </s> <unk> [CLS] [INST]",
    "You are an expert agent acting in a text environment. Now it is your turn to take an action within <action> tags.",
] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}[INST]{{ m.content | trim }}[/INST]{% endfor %}"
    "{% if add_generation_prompt %}<think>\n{% endif %}"
)
ALPHABET = "".join(sorted(set("".join(CORPUS)))) + "▁"


def _finished(tokenizer: Any, template: str, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    return fast


def byte_level() -> Any:
    """As Qwen's: special tokens and added markup behind the vocabulary, no BOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_end|>2"])
    tokenizer.add_tokens([AddedToken(token) for token in ("<think>", "</think>", "<tool_call>", " desk 1")])
    return _finished(tokenizer, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def byte_level_with_bos() -> Any:
    """As Llama 3's: BOS by the post-processor and by the template."""
    from tokenizers import processors

    tokenizer = byte_level().backend_tokenizer
    tokenizer.add_special_tokens(["<|begin|>", "[INST]", "[/INST]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return _finished(tokenizer, TRIMMING, eos_token="<|im_end|>", bos_token="<|begin|>")


def unigram() -> Any:
    """As sentencepiece's Unigram: control tokens are pieces of the vocabulary, words begin with ▁, BOS is added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", initial_alphabet=list(ALPHABET)
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _finished(tokenizer, CHATML, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def llama_2() -> Any:
    """As Llama 2's: BPE with a normaliser that puts ▁ before each text, bytes for what is unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    draft = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    draft.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special + bytes_, max_token_length=8)
    draft.train_from_iterator(CORPUS, trainer)
    draft.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Bytes are pieces of the vocabulary, no added tokens.
    tree = json.loads(draft.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if not token["content"].startswith("<0x")]
    draft = Tokenizer.from_str(json.dumps(tree))
    draft.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _finished(draft, TRIMMING, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def word_piece() -> Any:
    """As BERT's: lower-casing, `[CLS]` before each text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return _finished(tokenizer, CHATML, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]", cls_token="[CLS]")


def python_bytes() -> Any:
    """Written in Python: ByT5's."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


def python_sentencepiece() -> Any:
    """sentencepiece itself, wrapped in Python."""
    import sentencepiece
    from transformers import BertGenerationTokenizer

    folder = Path(mkdtemp())
    (folder / "corpus").write_text("\n".join(CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus"),
        model_prefix=str(folder / "sp"),
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        unk_id=3,
        bos_id=2,
        eos_id=1,
        minloglevel=2,
    )
    tokenizer = BertGenerationTokenizer(vocab_file=str(folder / "sp.model"))
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


KINDS: dict[str, Callable[[], Any]] = {
    maker.__name__: functools.cache(maker)
    for maker in (byte_level, byte_level_with_bos, unigram, llama_2, word_piece, python_bytes, python_sentencepiece)
}
