"""`anchorage plan`: whether a run fits its GPUs and its host, what does not fit, and which overrides make it fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anchorage.checks.capacity import cards_here, memory_here
from anchorage.cli.output import require_writable, write_text
from anchorage.planning.assumptions import Assumptions
from anchorage.planning.fixes import as_overrides, fixes, planned
from anchorage.planning.plan import GIB, Cards, Plan, cards_of, gib, make_plan
from anchorage.planning.shapes import shape_of
from services.config import load_config, recipe_yaml
from services.config.load import put
from services.errors import AnchorageError

PRINT = "-"
"""Value of `--fix` without a file."""
USUAL_GIB = 80.0
"""Cards to plan for where this machine has none and the recipe is for GPUs."""


def run_plan(
    recipe: Path,
    overrides: Sequence[str],
    *,
    gpus: str | None,
    memory_gib: float | None,
    assume: Sequence[str],
    fix: str | None,
    as_json: bool,
    console: Console,
) -> bool:
    """Print the plan and return whether the run fits.

    Args:
        recipe: of the run.
        overrides: as `key=value`.
        gpus: as `4x80`; None: those of this machine.
        memory_gib: of the host; None: that of this machine if `gpus` is None, else not known.
        assume: assumptions to change, as `name=value`.
        fix: file to write a recipe with the overrides to; `PRINT`: print them; None: neither.
        as_json: print JSON.
        console: to print to.

    Raises:
        AnchorageError: the recipe, the model's folder, or an option is invalid, or the file cannot be written.
    """
    file = None if fix in (None, PRINT) else Path(str(fix))
    if file is not None and file.exists():
        raise AnchorageError(f"--fix={file}: exists already; give the name of a new recipe")
    require_writable(file)
    if memory_gib is not None and not math.isfinite(memory_gib):
        raise AnchorageError(f"--memory {memory_gib:g}: must be a number of GiB")
    config = load_config(recipe, overrides)
    shape, assumed = shape_of(config.model.path), Assumptions().changed(assume)
    cards = cards_here() if gpus is None else cards_of(gpus)
    memory = memory_here() if gpus is None else None
    if memory_gib is not None:
        memory = int(memory_gib * GIB)
    note = ""
    if gpus is None and cards.count == 0 and config.model.dtype == "bfloat16":
        # A recipe for GPUs, looked at on a machine without any.
        needed = make_plan(config, shape, Cards(1, USUAL_GIB), assumed).cards_needed
        cards, memory = Cards(needed, USUAL_GIB), None if memory_gib is None else memory
        note = "this machine has no GPU; planned for the cards below (--gpus)"
    plan = make_plan(config, shape, cards, assumed, memory)
    changes = fixes(plan) if fix is not None or not plan.fits else None
    if file is not None and changes is not None:
        write_text(file, _recipe(recipe, overrides, changes, file))
    if as_json:
        console.print_json(data=plan.record() | {"fixes": None if changes is None else as_overrides(changes)})
    else:
        show(plan, console, note)
        _show_fixes(plan, changes, fix, file, console)
    return plan.fits


def show(plan: Plan, console: Console, note: str = "") -> None:
    """Print the table, the host, the times, and what was assumed."""
    config, used = plan.config, min(plan.cards_needed, plan.cards.count)
    size = plan.shape.parameters
    size_text = f"{size / 1e9:,.2f} billion" if size >= 1e8 else f"{size:,}"
    _say(console, f"{config.run.name}: {config.model.path.name}, {size_text} parameters, {config.model.dtype}")
    if note:
        _say(console, f"note: {note}")
    if plan.cards.count:
        ranks, actors = config.learner.ranks, config.rollout.actors
        shared = "taking turns on cards" if plan.turns else "sharing cards"
        together = shared if config.rollout.share_gpus else f"{used} used"
        _say(console, f"GPUs: {plan.cards}, {together}: {ranks} learner rank(s), {actors} actor(s)")
    console.print(_table(plan))
    engine = plan.engine
    _say(
        console,
        f"KV cache: {engine.tokens:,} tokens, {engine.episodes:,} episodes of {engine.context:,}; "
        f"{config.rollout.episodes_in_flight} in flight",
    )
    host, there = plan.host, "" if plan.memory is None else f" of {gib(plan.memory)}"
    _say(
        console,
        f"host memory: {gib(host.total)}{there} GiB (processes {gib(host.processes)}, learner {gib(host.learner)}, "
        f"engines {gib(host.engines)}, loading {gib(host.loading)}, weights {gib(host.weights)}, "
        f"trajectories {gib(host.buffer)})",
    )
    _say(console, f"disk: {gib(host.disk)} GiB in {config.run.dir}")
    if plan.timing is not None:
        timing = plan.timing
        moving = f", moving states {timing.moving:,.0f}" if plan.turns else ""
        _say(
            console,
            f"an update: {timing.update:,.0f} s (rollout {timing.rollout:,.0f}, learner {timing.learner:,.0f}, "
            f"weights {timing.weights:,.0f}{moving}); the longest episode: {timing.longest:,.0f} s",
        )
    figures = ", ".join(f"{name}={value:g}" for name, value in plan.assumed.record().items())
    _say(console, f"assumed (--assume): {figures}")
    for line in plan.problems:
        _say(console, f"does not fit: {line}")
    for line in plan.warnings:
        _say(console, f"warning: {line}")


def _table(plan: Plan) -> Table:
    """Memory of one rank and of one engine, in GiB."""
    where = "on one GPU" if plan.cards.count else "of host memory"
    table = Table(f"GiB {where}")
    table.add_column("learner rank", justify="right")
    table.add_column("engine", justify="right")
    engine = plan.engine
    own = {"parameters": engine.weights, "activations": engine.workspace, "overhead": engine.overhead}
    for name, size in plan.rank.items():
        table.add_row(name, gib(size), gib(own[name]) if name in own else "–")
    table.add_row("KV cache", "–", gib(engine.cache))
    table.add_section()
    table.add_row("total", gib(plan.rank_total), gib(engine.share))
    if plan.cards.count:
        table.add_row("of", gib(plan.card), gib(plan.card))
    return table


def _show_fixes(
    plan: Plan, changes: dict[str, Any] | None, fix: str | None, file: Path | None, console: Console
) -> None:
    """Print the overrides, and what they give; or that there are none."""
    if changes is None:
        if not plan.fits:
            _say(console, "no overrides make it fit: use more or larger GPUs, a smaller model, or a host with more")
        elif fix is None:
            _say(console, "it fits")
        return
    if not changes:
        _say(console, "it fits; nothing to change")
        return
    after = planned(plan, changes)
    where = "" if after.cards.count == 0 else f" (rank {gib(after.rank_total)}, engine {gib(after.engine.share)} GiB)"
    _say(console, f"{'better' if plan.fits else 'it fits'} with these overrides{where}:")
    for line in as_overrides(changes):
        _say(console, f"  {line}")
    if file is not None:
        _say(console, f"written to {file}")


def _recipe(recipe: Path, overrides: Sequence[str], changes: dict[str, Any], file: Path) -> str:
    """A recipe that extends the given one by the overrides and the changes."""
    from services import packaged

    base = packaged.find_recipe(recipe).resolve()
    folder = file.resolve().parent
    tree: dict[str, Any] = {"extends": str(base.relative_to(folder)) if base.is_relative_to(folder) else str(base)}
    given = {key: recipe_yaml.load(text) for key, _, text in (each.partition("=") for each in overrides)}
    for key, value in {**given, **changes}.items():
        for problem in put(tree, key, value, merges=True):
            raise AssertionError(problem)  # both were valid for a configuration
    return recipe_yaml.dump(tree)


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False)
