"""`python -m env_servers.scaffold NAME`: create a new environment. Errors are one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from env_servers.arguments import Parser, fail
from env_servers.errors import ServerError
from env_servers.scaffold.make import class_name, make_project

NEXT_STEPS = """\
created {folder}: a working environment with tests and a Dockerfile
  cd {folder}
  python -m pytest                                             # tests, including the conformance check
  anchorage env serve {name}.environment:{cls} --port 8001     # serve it
  anchorage env check http://127.0.0.1:8001                    # check a running server
then replace the example in {name}/environment.py
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m env_servers.scaffold") -> int:
    parser = Parser(
        prog, description="Create a new environment from a working template.", epilog=f"Example: {prog} rock_paper"
    )
    parser.add_argument("name", help="name of the environment and of its package, such as rock_paper")
    parser.add_argument(
        "--in", dest="parent", type=Path, default=Path(), metavar="FOLDER", help="parent folder (current folder)"
    )
    given = parser.parse_args(arguments)
    try:
        folder = make_project(given.name, given.parent)
    except ServerError as error:
        return fail(error)
    sys.stdout.write(NEXT_STEPS.format(folder=folder, name=given.name, cls=class_name(given.name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
