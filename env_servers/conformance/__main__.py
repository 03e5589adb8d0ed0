"""`python -m env_servers.conformance URL`: checks whether a server is fit for training.

Exit codes: 0 fit, 1 not fit, 2 wrong arguments or no server to check.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from env_servers.arguments import Parser, fail, positive, seconds, writable
from env_servers.client import EnvironmentUnavailableError, RequestRejected
from env_servers.conformance.findings import Finding
from env_servers.conformance.run import Options, Report, check_server
from env_servers.errors import one_line
from env_servers.server.settings import TOKEN_VARIABLE, token_from

MARKS = {"ok": "ok", "fail": "FAIL", "note": "note"}
WIDEST = 120


def main(arguments: Sequence[str] | None = None, prog: str = "python -m env_servers.conformance") -> int:
    given = _parser(prog).parse_args(arguments)
    token = token_from(given.token_env)
    options = Options(
        tasks=given.tasks,
        steps=given.steps,
        sessions=given.sessions,
        seconds=given.seconds,
        least_steps_per_s=given.least_steps_per_s,
        actions=given.action,
    )
    secret = None if token is None else token.get_secret_value()
    try:
        report = asyncio.run(check_server(given.url, secret, options, _tell))
    except (EnvironmentUnavailableError, RequestRejected, ValueError) as error:
        return fail(error)
    _conclude(report)
    if given.json is not None:
        given.json.write_text(json.dumps(_document(report), indent=2) + "\n")
    return 0 if report.fit else 1


def _tell(finding: Finding) -> None:
    """Print one row of the table as soon as it is known."""
    width = min(WIDEST, shutil.get_terminal_size().columns) - 24
    head, *rest = textwrap.wrap(finding.seen, max(40, width)) or [""]
    sys.stdout.write(f"{finding.check:<16}{MARKS[finding.verdict]:<6}{head}\n")
    sys.stdout.writelines(f"{'':22}{line}\n" for line in rest)
    sys.stdout.flush()


def _conclude(report: Report) -> None:
    splits = ", ".join(f"{one_line(name)} {size:,}" for name, size in report.info.splits.items())
    failed = [finding.check for finding in report.findings if finding.verdict == "fail"]
    verdict = f"NOT fit for training: {', '.join(failed)}" if failed else "fit for training"
    served = one_line(f"{report.info.name} {report.info.version}")
    sys.stdout.write(f"\n{served} at {report.url} ({splits}): {verdict}\n")


def _document(report: Report) -> dict[str, object]:
    return {
        "url": report.url,
        "info": report.info.model_dump(),
        "fit": report.fit,
        "findings": [asdict(finding) for finding in report.findings],
        "notes": [asdict(note) for note in report.notes],
    }


def _parser(prog: str) -> argparse.ArgumentParser:
    defaults = Options()
    parser = Parser(
        prog,
        description="Check whether an environment server is fit for training.",
        epilog=f"Example: {prog} http://127.0.0.1:8001",
    )
    parser.add_argument("url", help="http://host:port, or openenv+http://host:port for an OpenEnv server")
    parser.add_argument("--token-env", metavar="VARIABLE", default=TOKEN_VARIABLE, help="variable that holds the token")
    parser.add_argument("--tasks", type=positive, default=defaults.tasks, help="number of tasks to play")
    parser.add_argument(
        "--steps", type=positive, default=defaults.steps, help="maximum number of actions of an episode"
    )
    parser.add_argument(
        "--action", action="append", default=[], help="action to try where the server lists none; repeatable"
    )
    parser.add_argument(
        "--sessions", type=positive, default=defaults.sessions, help="sessions of the speed measurement"
    )
    parser.add_argument("--seconds", type=seconds, default=defaults.seconds, help="length of the speed measurement")
    parser.add_argument("--least-steps-per-s", type=float, default=0.0, help="minimum rate; a slower server is not fit")
    parser.add_argument("--json", type=writable, metavar="FILE", help="also write the findings to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
