"""`anchorage model …`: checks model folders before a run uses them."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anchorage.checks.tokenizer import Finding
from services import packaged
from services.telemetry import setup_logging

app = typer.Typer(no_args_is_help=True, help="Model folders.")

MARKS = {"ok": "ok", "note": "note", "problem": "[bold red]wrong[/]", "skipped": "–"}


QUIET = {
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-torch._library",
}
"""Variables for the engine's process, which writes to this terminal: only the table is wanted there."""


class Dtype(StrEnum):
    """`model.dtype` of the planned run."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@app.callback()
def model() -> None:
    """Model folders."""


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Local Hugging Face folder of a causal language model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Compare in this type: model.dtype of the planned run.")] = Dtype.FLOAT32,
    engine: Annotated[bool, typer.Option(help="Also start vLLM.")] = True,
) -> None:
    """Check whether a model can be trained exactly. Example: anchorage model check models/starter

    Compares the learner with the model's own forward pass, and vLLM with the learner: at its start, and after
    publishing the same weights, changed ones, and adapters. Exit code 1 if something is wrong.
    """
    from anchorage.checks.model import check_model, is_fit

    setup_logging("CRITICAL")
    # The engine's process inherits this level: an error is a finding, not a traceback.
    logging.getLogger().setLevel(logging.CRITICAL)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    console = Console(emoji=False)
    with Console(stderr=True).status("reading the folder") as status:
        findings = check_model(packaged.find(folder), dtype.value, engine=engine, on_step=status.update)
    if as_json:
        console.print_json(
            data={"folder": str(folder), "fit": is_fit(findings), "findings": list(map(asdict, findings))}
        )
    else:
        show(folder, findings, console)
    if not is_fit(findings):
        raise typer.Exit(1)


def show(folder: Path, findings: list[Finding], console: Console) -> None:
    """Print the table, then a line for each problem and each note."""
    table = Table(escape(str(folder)), "found", "")
    for finding in findings:
        table.add_row(escape(finding.name), escape(finding.value), MARKS[finding.verdict])
    console.print(table)
    for verdict in ("problem", "note"):
        for finding in findings:
            if finding.verdict == verdict and finding.line:
                console.print(f"{MARKS[verdict]}: ", end="")
                console.print(finding.line, markup=False, highlight=False, soft_wrap=True)
