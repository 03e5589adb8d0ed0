from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner import warmstart
from services.config.tree import WarmstartConfig, WarmstartPhase

SMALL = WarmstartConfig(vocab_size=300, hidden_size=32, intermediate_size=64, layers=2)
PHASE = WarmstartPhase(tokens=100_000, lr=5e-3)
TEXTS = ["see: pen\ndo: take pen", "see: mug\ndo: take mug"] * 50


@dataclass
class Row:
    tokens: list[int]
    targets: list[Mapping[int, float]]


def test_a_small_policy_learns_to_copy_and_the_folder_loads_again(tmp_path: Path) -> None:
    tokenizer = warmstart.train_tokenizer(TEXTS, SMALL.vocab_size)
    model = warmstart.new_model(SMALL, len(tokenizer), tokenizer.eos_token_id, 64, seed=0)
    rows = []
    for text in TEXTS * 120:
        prompt, response = text.split(" take", 1)
        read, written = tokenizer.encode(prompt), [*tokenizer.encode(" take" + response), tokenizer.eos_token_id]
        rows.append(Row(read + written, [{}] * len(read) + [{token: 1.0} for token in written]))
    seen: list[warmstart.FitProgress] = []
    warmstart.fit(model, rows, PHASE, 400, seen.append)
    assert seen[-1].response_loss < 0.05 < seen[0].response_loss
    warmstart.save(model, tokenizer, tmp_path)
    modes = {(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert len(modes) == 1  # what may read one may read all

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for noun in ("pen", "mug"):
        ids = torch.tensor([again.encode(f"see: {noun}\ndo:")])
        answer = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert again.decode(answer[0, ids.shape[1] :], skip_special_tokens=True) == f" take {noun}"


def test_a_random_players_probabilities_are_learnt_from_single_episodes() -> None:
    tokenizer = warmstart.train_tokenizer(TEXTS, SMALL.vocab_size)
    model = warmstart.new_model(SMALL, len(tokenizer), tokenizer.eos_token_id, 64, seed=0)
    read, wanted = tokenizer.encode("do:"), {7: 0.5, 8: 0.3, 9: 0.2}
    rows = [Row([*read, 7], [{}] * len(read) + [wanted])] * 20_000
    last = warmstart.fit(model, rows, PHASE, 400, lambda progress: None)
    assert last.response_loss < 0.01
    with torch.no_grad():
        chances = model(torch.tensor([read])).logits[0, -1].softmax(-1)
    assert {token: round(chances[token].item(), 1) for token in wanted} == wanted


def test_what_is_lost_astray_is_the_part_of_the_divergence_outside_the_wanted_tokens() -> None:
    torch.manual_seed(0)
    logits, wanted = torch.randn(2, 6), [{1: 0.25, 4: 0.75}, {0: 1.0}]
    divergence, astray = warmstart._divergence(logits, wanted)
    chances = logits.softmax(-1)
    among = [chances[0, [1, 4]], chances[1, [0]]]
    assert torch.allclose(astray, -sum(part.sum().log() for part in among) / 2)
    goal = torch.tensor([0.25, 0.75])
    rest = (goal * (goal / (among[0] / among[0].sum())).log()).sum() / 2
    assert torch.allclose(divergence, astray + rest)


def test_the_seed_decides_the_weights() -> None:
    first, second = (warmstart.new_model(SMALL, 300, 0, 64, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_common_words_and_numbered_names_are_one_token_and_every_text_survives() -> None:
    tokenizer = warmstart.train_tokenizer([*TEXTS, "go to desk 1; take pen 12 from desk 1\n"] * 60, 350)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" take pen 12")) == ["Ġtake", " pen 12"]
    for text in ("Größe 10 km², <action>\n\tx</action>", " desk 1desk 2", "pen  12"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
