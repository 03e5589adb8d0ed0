"""The `anchorage` command. Each user error is one line on standard error, with a non-zero exit code.

Exit codes: 0 success, 1 failure, 2 invalid arguments or configuration, 130 stopped by a signal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperCommand

from anchorage.cli import buffer, model, pool
from anchorage.cli import config as config_commands
from anchorage.cli.output import literal_console, require_writable
from anchorage.runs.resume import Resume
from services.config import Config, ConfigError, load_config
from services.config.masking import masked
from services.errors import AnchorageError
from services.run_folder import run_config
from services.telemetry import setup_logging

if TYPE_CHECKING:
    from anchorage.api_models.settings import Route

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
env_app = typer.Typer(no_args_is_help=True, help="Environment servers.")
app.add_typer(env_app, name="env")
app.add_typer(model.app, name="model")
app.add_typer(buffer.app, name="buffer")
app.add_typer(config_commands.app, name="config")
app.add_typer(pool.app, name="pool")
console = literal_console()

DISTRIBUTION = "anchorage-rl"
TRAINING = {"accelerate", "deepspeed", "jinja2", "peft", "ray", "safetensors", "tensorboard", "tokenizers", "torch"}
TRAINING |= {"transformers", "vllm"}
"""Packages of the extra `train`, without which environments can be served but nothing can be trained."""

Recipe = Annotated[Path | None, typer.Argument(help="Recipe (YAML), as in configs/. None: that of the first policy.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, as in learner.updates=50 algorithm=grpo.")]


def _version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"anchorage {metadata.version(DISTRIBUTION)}")
    except metadata.PackageNotFoundError:
        typer.echo("anchorage (a checkout that is not installed)")
    raise typer.Exit


@app.callback()
def anchorage(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train LLM agents with GiGPO, and serve the environments that they play."""


class _TrainCommand(TyperCommand):
    """Accepts `--resume` without a value, which Typer's options cannot, as `--resume=yes`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--resume=yes" if argument == "--resume" else argument for argument in args])


class _PlanCommand(TyperCommand):
    """Accepts `--fix` without a value, as `--fix=-`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--fix=-" if argument == "--fix" else argument for argument in args])


@app.command(cls=_TrainCommand)
def train(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe (YAML), or the name of one that comes with the project: demo.")
    ],
    overrides: Overrides = None,
    resume: Annotated[
        Resume,
        typer.Option(
            metavar="[=auto]",
            show_default=False,
            help="Resume the run from its newest checkpoint. With `=auto`: start it if it does not exist.",
        ),
    ] = Resume.NO,
) -> None:
    """Train a policy. Example: anchorage train configs/demo.yaml learner.updates=20 run.name=first"""
    from anchorage.cli.progress import Display
    from anchorage.cli.signals import stop_on_signals
    from anchorage.runs.training import run_training

    config = _configure(recipe, overrides)
    with stop_on_signals() as stopped, Display(console) as display:
        finished = run_training(config, resume=resume, on_progress=display, should_stop=stopped)
    _exit_if_stopped(finished)


@app.command(cls=_PlanCommand)
def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML), as in configs/.")],
    overrides: Overrides = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="NUMBERxGIB", help="GPUs to plan for; 0: none. None: those of this machine.")
    ] = None,
    memory: Annotated[float | None, typer.Option(min=0.1, help="Memory of the host in GiB.")] = None,
    assume: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Change an assumption that the plan prints.")
    ] = None,
    fix: Annotated[
        str | None,
        typer.Option(metavar="[=FILE]", help="Print overrides that make it fit. With `=FILE`: write a recipe."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether a run fits its GPUs and its host. Example: anchorage plan configs/alfworld.yaml --gpus 2x80

    Starts nothing and loads no weights: a folder with `config.json` is enough. Exit code 1 if something does not fit.
    """
    from anchorage.cli.plan import run_plan

    fits = run_plan(
        recipe,
        overrides or (),
        gpus=gpus,
        memory_gib=memory,
        assume=assume or (),
        fix=fix,
        as_json=as_json,
        console=console,
    )
    if not fits:
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    recipe: Recipe = None,
    overrides: Overrides = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of a model, run or checkpoint, `random`, `expert`, or `api:NAME` for a model behind an "
            "OpenAI-compatible API; repeatable. None: model.path."
        ),
    ] = None,
    env: Annotated[str | None, typer.Option(help="Environment to play, if the recipe has several.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Short for evaluation.split; several: [valid_seen, valid_unseen].")
    ] = None,
    episodes: Annotated[int | None, typer.Option(help="Episodes of a panel; short for evaluation.episodes.")] = None,
    panels: Annotated[int | None, typer.Option(help="Panels of different tasks; short for evaluation.panels.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Episodes of each task; short for evaluation.seeds.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Short for evaluation.temperature.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table to this file.")] = None,
    api_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Base URL of the API, such as http://host:8000/v1.")
    ] = None,
    api_route: Annotated[
        str, typer.Option(metavar="[chat|completions]", help="Send messages, or one text to a base model.")
    ] = "chat",
    api_timeout: Annotated[float, typer.Option(help="Seconds to wait for one response of the API.")] = 60.0,
    at_once: Annotated[int, typer.Option(help="Episodes that an API model plays concurrently.")] = 8,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="IN,OUT", help="Price of a million tokens, or NAME=IN,OUT for one model; repeatable."),
    ] = None,
    transcripts: Annotated[
        Path | None, typer.Option(help="Write the episodes of API models to this file, as JSON lines.")
    ] = None,
) -> None:
    """Evaluate policies. Example: anchorage eval configs/demo.yaml --policy models/starter --policy random

    The URL and the key of an API are OPENAI_BASE_URL (or --api-url) and OPENAI_API_KEY (or OPENAI_API_KEY_FILE).
    """
    from anchorage.api_models.settings import ApiOptions, parse_prices
    from anchorage.cli.evaluate import run_evaluation
    from anchorage.runs.evaluation import evaluation_config

    short: dict[str, object] = {"split": split, "episodes": episodes, "panels": panels, "seeds": seeds}
    short |= {"temperature": temperature}
    given = list(overrides or ())
    if recipe is not None and "=" in str(recipe) and not recipe.exists():
        recipe, given = None, [str(recipe), *given]  # without a recipe, the first override is parsed as one
    given += (f"evaluation.{key}={value}" for key, value in short.items() if value is not None)
    config = evaluation_config(recipe, given, policy or (), env)
    setup_logging(config.telemetry.log_level)
    route = cast("Route", api_route)  # which is checked there
    api = ApiOptions(api_url, at_once, api_timeout, route, parse_prices(price or ()), transcripts)
    finished = run_evaluation(
        config, policy or (), json_file=json_file, markdown_file=markdown_file, console=console, api=api
    )
    _exit_if_stopped(finished)


@app.command()
def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides, as in algorithm=grpo; before them another recipe (.yaml).")
    ] = None,
) -> None:
    """Run the whole system on this machine in minutes. Example: anchorage demo algorithm=grpo

    It evaluates model.path, trains it, and evaluates it again on the same tasks.
    """
    from anchorage.cli.demo import run_demo
    from anchorage.runs.demo import default_recipe

    given = list(overrides or ())
    recipe = Path(given.pop(0)) if given and given[0].endswith((".yaml", ".yml")) and "=" not in given[0] else None
    config = _configure(recipe or default_recipe(), given)
    _exit_if_stopped(run_demo(config, console=console))


@app.command()
def warmstart(
    out: Annotated[Path, typer.Argument(help="Folder to write the policy to.")],
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).")] = Path("configs/starter.yaml"),
    overrides: Overrides = None,
    start: Annotated[
        Path | None, typer.Option(help="Continue from this folder, which earlier phases have written.")
    ] = None,
    first_phase: Annotated[int, typer.Option(min=1, help="Number of the first phase to run.")] = 1,
) -> None:
    """Train a starter policy on scripted play. Example: anchorage warmstart models/mine configs/starter.yaml"""
    from anchorage.cli.progress import bar
    from anchorage.runs.warmstart import make_starter

    config = _configure(recipe, overrides)
    total = sum(phase.tokens for phase in config.warmstart.phases[first_phase - 1 :])
    with bar(console, "warm start", total, "tokens") as show:
        result = make_starter(
            config, out, lambda done, loss: show(min(done, total), f"loss {loss:.3f}"), start, first_phase
        )
    console.print_json(data=result["phases"])


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run's folder (its newest checkpoint), or a checkpoint's.")],
    out: Annotated[Path | None, typer.Argument(help="Folder to write the policy to, new or empty.")] = None,
    best: Annotated[bool, typer.Option(help="The run's best policy by its evaluations, not the newest.")] = False,
    episodes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the run's episodes to this file: .jsonl or .parquet.")
    ] = None,
) -> None:
    """Write a policy as a Hugging Face folder that vLLM serves. Example: anchorage export runs/demo models/mine

    With `--episodes FILE` write every episode that the run keeps, with prompts, responses, token ids,
    log-probabilities, rewards, anchors and advantages. Example: anchorage export runs/demo --episodes demo.jsonl
    """
    from anchorage.runs.episodes import export_episodes
    from anchorage.runs.export import export_policy

    if out is None and episodes is None:
        raise typer.BadParameter("give a folder for the policy, or --episodes FILE, or both")
    if out is not None:
        typer.echo(f"{export_policy(source, out, best=best)} → {out}")
    if episodes is not None:
        typer.echo(f"{export_episodes(source, episodes)} episodes of {source} → {episodes}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    picture: Annotated[Path | None, typer.Option(help="Draw the curves of all runs into this PNG file.")] = None,
) -> None:
    """Write each run's tables and curves as HTML. Example: anchorage report runs/gigpo runs/grpo --picture a.png"""
    from anchorage.cli import report as report_page

    configs = {run: run_config(run) for run in runs}
    require_writable(*(run / report_page.PAGE_NAME for run in runs), picture)
    for run, config in configs.items():
        typer.echo(report_page.write(run, config))
    if picture is not None:
        report_page.write_picture(runs, picture)
        typer.echo(picture)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the state of a run. Example: anchorage status runs/demo"""
    from anchorage.cli.status import print_status

    print_status(run, as_json=as_json, console=console)


@app.command()
def control(
    runs: Annotated[Path, typer.Argument(help="Folder that holds the runs.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on; tokens are required beyond loopback.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free port.")] = 8080,
    ready_file: Annotated[
        Path | None, typer.Option(help="File that the URL is written to once the server listens.")
    ] = None,
    requests_per_minute: Annotated[int, typer.Option(min=1, help="Rate limit of one client address.")] = 1200,
) -> None:
    """Serve the dashboard and the control plane. Example: anchorage control runs --port 8080

    Tokens come from ANCHORAGE_CONTROL_READ_TOKEN and ANCHORAGE_CONTROL_ADMIN_TOKEN, or from the files that
    ANCHORAGE_CONTROL_READ_TOKEN_FILE and ANCHORAGE_CONTROL_ADMIN_TOKEN_FILE name.
    """
    from anchorage.cli.control import run_control

    setup_logging("INFO")
    run_control(
        runs,
        host=host,
        port=port,
        ready_file=ready_file,
        requests_per_minute=requests_per_minute,
        console=console,
    )


PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@env_app.command("serve", context_settings=PASS_ON)
def serve(context: typer.Context) -> None:
    """Serve an environment. Example: anchorage env serve alfworld --port 8001 --workers 4"""
    # A process that has imported none of our packages but env_servers: the environment's own may have the same names.
    start = "import sys; from env_servers.__main__ import main; sys.exit(main(prog='anchorage env serve'))"
    os.execv(sys.executable, [sys.executable, "-c", start, *context.args])


@env_app.command("check", context_settings=PASS_ON)
def check(context: typer.Context) -> None:
    """Check whether a server is fit for training. Example: anchorage env check http://127.0.0.1:8001"""
    from env_servers.conformance.__main__ import main as check_main

    raise typer.Exit(check_main(context.args, "anchorage env check"))


@env_app.command("new", context_settings=PASS_ON)
def new(context: typer.Context) -> None:
    """Create a new environment from a working template. Example: anchorage env new rock_paper"""
    from env_servers.scaffold.__main__ import main as new_main

    raise typer.Exit(new_main(context.args, "anchorage env new"))


def _configure(recipe: Path | None, overrides: list[str] | None) -> Config:
    config = load_config(recipe, overrides or ())
    setup_logging(config.telemetry.log_level)
    return config


def _exit_if_stopped(finished: bool) -> None:
    if not finished:
        raise typer.Exit(130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Raises SystemExit where the exit code is not 0."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # standard error is for messages
    try:
        code = app(args=arguments, standalone_mode=False)
    except typer.TyperException as error:  # invalid arguments; empty after the help was printed
        _fail(" ".join(error.format_message().replace("Value error, ", "").split()), 2)
    except ConfigError as error:
        _fail(str(error), 2)
    except AnchorageError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in TRAINING:
            raise
        _fail(f"{error.name} is not installed, which this command needs: pip install '{DISTRIBUTION}[train]'", 1)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", 1)
    if code:
        sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.writelines(f"anchorage: {masked(line)}\n" for line in message.splitlines())
    sys.exit(code)


if __name__ == "__main__":
    main()
