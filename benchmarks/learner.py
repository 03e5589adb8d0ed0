"""Speed of a policy update on ragged episode data, compared with two loops that pad.

`python -m benchmarks.learner [--template compact|think] [--episodes N] [--json FILE]`, on the CPU. The rows are the
steps of scripted ALFWorld episodes in groups of 8, as the learner trains on them. Each side does whole updates on the
same rows with the same model in float32: forward and backward pass over every row, PPO loss, AdamW step.

- ours: `learner.batching.plan` and the DeepSpeed engine, one rank.
- padded: plain Hugging Face, as verl-agent trains: prompts padded left, responses right, to the longest of the
  micro-batch.
- trl: `GRPOTrainer.compute_loss` of TRL on the same padded micro-batches, without generation. TRL is optional:
  `requirements/bench-trl.txt` pins it. If it is not installed, a line says so.

Tokens are the prompt and response tokens of the rows, counted once per row for every side. Tokens that ours does not
compute again, because rows share a prefix, count too; padding does not count for any side.

Updates on a GPU are measured by `benchmarks.gpu_check`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import platform
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from actors.prompts import Exchange, PromptBuilder, load_tokenizer
from actors.scripted import HabitualPlayer, NoisyExpert, Player, play_scripted
from benchmarks import record
from benchmarks.parts.updates import GROUP, apply
from env_servers.arguments import positive
from env_servers.clients.local import LocalClient
from env_servers.registry import load_environment
from learner.batching import Row, plan
from learner.prepare import OptimizerStep
from learner.rank.engine_deepspeed import DeepSpeedEngine, connect
from services.config.tree import Config
from services.schemas import Task

STEPS = {"compact": 20, "think": 50}
PROMPT_TOKENS = {"compact": 1000, "think": 2048}
Update = Callable[[], None]


def episode_rows(template: str, episodes: int, model: Path) -> list[Row]:
    """Return the steps of scripted episodes as rows, with made-up advantages and log-probabilities of the sampler."""
    tokenizer = load_tokenizer(model)
    settings = Config.model_validate({"prompt": {"template": template}}).prompt
    prompts = PromptBuilder(settings, tokenizer, PROMPT_TOKENS[template])
    client = LocalClient(load_environment("alfworld"))
    values = np.random.default_rng(0)
    rows: list[Row] = []

    async def play(number: int) -> None:
        rng = random.Random(number)
        expert = number % GROUP < 5
        player: Player = NoisyExpert(rng, rng.uniform(0.1, 0.7)) if expert else HabitualPlayer(rng)
        task = Task(env="alfworld", split="train", index=number // GROUP)
        history: list[Exchange] = []
        advantage = float(values.normal())
        async for turn in play_scripted(client, task, player, STEPS[template]):
            prompt, response = prompts.build(turn.goal, history, turn.result), " " + turn.action
            ids = [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]
            history.append(Exchange(turn.result.observation, turn.action, response, ids))
            rows.append(Row(np.array([*prompt.ids, *ids], np.int32), np.full(len(ids), -1.0, np.float32), advantage))

    async def all_of_them() -> None:
        for number in range(episodes):
            await play(number)

    asyncio.run(all_of_them())
    return rows


def ours(rows: Sequence[Row], model: Path, budget: int, folder: Path) -> Update:
    """Return an update as our learner does it: packed, with DeepSpeed."""
    config = Config.model_validate(
        {"model": {"path": model}, "run": {"dir": folder}, "loss": {"kl_coef": 0.0, "importance_cap": None}}
    )
    engine = DeepSpeedEngine(config)
    total = sum(row.response_tokens for row in rows)

    def update() -> None:
        (batches,) = plan(rows, 1, budget)
        apply(engine, config, OptimizerStep(total, batches))

    return update


def padded_batches(rows: Sequence[Row], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield micro-batches of `size` rows in order, with prompts padded left and responses right to the longest.

    All tensors have shape (rows, tokens), except `advantages` with shape (rows,).
    """
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        prompt = max(len(row.tokens) - row.response_tokens for row in some)
        response = max(row.response_tokens for row in some)
        ids = torch.zeros(len(some), prompt + response, dtype=torch.long)
        mask = torch.zeros_like(ids)
        old = torch.zeros(len(some), response)
        for line, row in enumerate(some):
            first = prompt - (len(row.tokens) - row.response_tokens)
            ids[line, first : first + len(row.tokens)] = torch.tensor(row.tokens)
            mask[line, first : first + len(row.tokens)] = 1
            old[line, : row.response_tokens] = torch.tensor(row.logprobs)
        yield {
            "prompt_ids": ids[:, :prompt],
            "prompt_mask": mask[:, :prompt],
            "completion_ids": ids[:, prompt:],
            "completion_mask": mask[:, prompt:],
            "old_per_token_logps": old,
            "advantages": torch.tensor([row.advantage for row in some]),
        }


def padded(rows: Sequence[Row], model: Path, size: int) -> Update:
    """Return an update in plain Hugging Face on padded rows. It computes logits of responses only, which favours it."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-6, fused=True)
    total = sum(row.response_tokens for row in rows)

    def update() -> None:
        for batch in padded_batches(rows, size):
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            places = (mask.cumsum(1) - 1).clamp(min=0)
            keep = batch["completion_ids"].shape[1]
            out = lm(ids, attention_mask=mask, position_ids=places, logits_to_keep=keep + 1, use_cache=False)
            logs = out.logits[:, :-1].float().log_softmax(-1)
            logprob = logs.gather(2, batch["completion_ids"][..., None])[..., 0]
            ratio = (logprob - batch["old_per_token_logps"]).exp()
            advantage = batch["advantages"][:, None]
            objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            torch.autograd.backward(-(objective * batch["completion_mask"]).sum() / total)
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def trl(rows: Sequence[Row], model: Path, size: int, folder: Path) -> Update:
    """Return an update with the loss of TRL's GRPOTrainer. Raises ImportError if TRL is not installed."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=size,
        num_generations=size,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        beta=0.0,
        loss_type="dapo",
        report_to=[],
        model_init_kwargs={"dtype": "float32"},
    )
    data = Dataset.from_list([{"prompt": "look"}] * size)
    trainer = GRPOTrainer(str(model), reward_funcs=lambda completions, **_: [0.0], args=settings, train_dataset=data)
    trainer.current_gradient_accumulation_steps = 1
    lm = trainer.model.train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-6, fused=True)
    total = torch.tensor(float(sum(row.response_tokens for row in rows)))

    def update() -> None:
        for batch in padded_batches(rows, size):
            trainer.accelerator.backward(trainer.compute_loss(lm, batch | {"num_items_in_batch": total}))
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def seconds(update: Update, repeats: int) -> list[float]:
    """Return the processor seconds of each update, which exclude other work on the machine, after one warm-up."""
    update()
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        update()
        taken.append(time.process_time() - started)
    return taken


def compare(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Measure all sides on the same rows, one side after the other."""
    rows = episode_rows(options.template, options.episodes, options.model)
    tokens = sum(len(row.tokens) for row in rows)
    (batches,) = plan(rows, 1, options.budget)
    in_padded = sum(b["prompt_ids"].numel() + b["completion_ids"].numel() for b in padded_batches(rows, options.rows))
    sides: dict[str, Callable[[], Update]] = {
        "ours": lambda: ours(rows, options.model, options.budget, folder),
        "padded": lambda: padded(rows, options.model, options.rows),
        "trl": lambda: trl(rows, options.model, options.rows, folder),
    }
    figures: dict[str, Any] = {
        "template": options.template,
        "rows": len(rows),
        "tokens": tokens,
        "tokens_computed": {"ours": sum(batch.tokens for batch in batches), "padded": in_padded, "trl": in_padded},
    }
    rates: dict[str, float] = {}
    for name, make in sides.items():
        try:
            taken = seconds(make(), options.repeats)
        except ImportError as error:
            console.print(f"{name}: not installed ({error}); see requirements/bench-trl.txt")
            continue
        rates[name] = tokens / statistics.median(taken)
        figures[name] = {"seconds": taken, "tokens_per_second": rates[name]}
    figures["ratio"] = rates["ours"] / max(rate for name, rate in rates.items() if name != "ours")
    table = Table("side", "tokens/s", "tokens computed", title=f"{options.template}: {len(rows)} rows, {tokens} tokens")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}", f"{figures['tokens_computed'][name]:,}")
    console.print(table)
    console.print(f"ours over the faster of the others: {figures['ratio']:.2f}")
    return figures


def main() -> None:
    parser = record.parser("Measure the speed of a policy update.")
    parser.add_argument("--template", choices=sorted(STEPS), default="compact")
    parser.add_argument("--episodes", type=positive, default=16, help=f"a multiple of {GROUP}")
    parser.add_argument("--model", type=Path, default=Path("models/starter"))
    parser.add_argument("--budget", type=positive, default=2048, help="learner.microbatch_tokens")
    parser.add_argument("--rows", type=positive, default=8, help="rows of a padded micro-batch")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    connect(0, 1, "127.0.0.1", port)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(options, Path(folder), console)
    figures |= {"threads": options.threads, "python": platform.python_version(), "torch": torch.__version__}
    record.keep(figures, options.json)


if __name__ == "__main__":
    main()
