"""The reference in `docs/` is that of the code."""

from __future__ import annotations

from env_servers.server.reference import main, reference
from tests.processes import ROOT


def test_the_reference_is_up_to_date() -> None:
    text = (ROOT / "docs" / "env-api.md").read_text()
    assert text == reference(), "run python -m env_servers.server.reference docs/env-api.md"


def test_it_names_every_route_and_schema() -> None:
    text = reference()
    for heading in ("`POST /step`", "`POST /batch/reset`", "`GET /agentgym/observation`", "StepResult", "Problem"):
        assert f"### {heading}\n" in text
    assert main(["a", "b"]) == 2
