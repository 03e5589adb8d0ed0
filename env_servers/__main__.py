"""`python -m env_servers NAME`: serve one environment. Errors are one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from env_servers.arguments import Parser, fail
from env_servers.errors import ServerError, summary
from env_servers.registry import load_environment
from env_servers.server.serve import serve
from env_servers.server.settings import TOKEN_VARIABLE, ServerSettings, token_from


def main(arguments: Sequence[str] | None = None, prog: str = "python -m env_servers") -> int:
    options = _parser(prog).parse_args(arguments)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # finds an environment in the current folder
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        serve(load_environment(options.environment, options.params), _settings(options))
    except ServerError as error:
        return fail(error)
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    fields = ServerSettings.model_fields
    parser = Parser(
        prog, description="Serve an environment over HTTP.", epilog=f"Example: {prog} alfworld --port 8001 --workers 4"
    )
    parser.add_argument("environment", metavar="NAME|MODULE:CLASS", help="registered name, or an Environment class")
    parser.add_argument(
        "--params",
        metavar="JSON",
        type=_mapping,
        default={},
        help="""parameters of the environment, such as '{"size": 5}'; process lists show them: no secrets""",
    )
    parser.add_argument(
        "--token-env", metavar="VARIABLE", help=f"environment variable that holds the token ({TOKEN_VARIABLE})"
    )
    for name, kind in _OPTIONS.items():
        field = fields[name]
        default = "" if field.default is None else f" ({field.default})"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=f"{field.description}{default}")
    return parser


_OPTIONS = {
    "host": str,
    "port": int,
    "ready_file": Path,
    "max_sessions": int,
    "idle_seconds": float,
    "max_body_bytes": int,
    "max_requests": int,
    "workers": int,
    "threads": int,
    "call_seconds": float,
}


def _mapping(text: str) -> dict[str, object]:
    """A JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return found


def _settings(options: argparse.Namespace) -> ServerSettings:
    given = {name: value for name, value in vars(options).items() if name in _OPTIONS}
    if options.token_env is not None:
        given["token"] = token_from(options.token_env)
        if given["token"] is None:
            raise ServerError(f"--token-env: variable {options.token_env} is not set")
    try:
        return ServerSettings(**given)
    except ValidationError as error:
        raise ServerError(f"invalid option: {summary(error)}") from error


if __name__ == "__main__":
    sys.exit(main())
