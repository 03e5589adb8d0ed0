"""`anchorage control`: serves the control plane and the dashboard for a folder of runs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from anchorage.cli.output import require_writable
from services.control.settings import ADMIN_TOKEN_VARIABLE, READ_TOKEN_VARIABLE, ControlSettings, token_from


def run_control(
    runs: Path, *, host: str, port: int, ready_file: Path | None, requests_per_minute: int, console: Console
) -> None:
    """Serve until a signal arrives.

    Raises:
        ControlRefused: serving would be unsafe, or is impossible.
    """
    from learner.comparison import compare
    from services.control.serve import serve

    require_writable(ready_file)
    settings = ControlSettings(
        runs=runs,
        host=host,
        port=port,
        read_token=token_from(READ_TOKEN_VARIABLE),
        admin_token=token_from(ADMIN_TOKEN_VARIABLE),
        ready_file=ready_file,
        requests_per_minute=requests_per_minute,
    )
    tokens = "no token is set: anyone who reaches this port can act" if settings.open else "a token is required"
    serve(
        settings,
        on_ready=lambda url: console.print(f"dashboard at {url} ({tokens})", highlight=False, soft_wrap=True),
        compare=compare,
    )
