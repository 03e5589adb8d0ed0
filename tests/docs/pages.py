"""The documentation as tests read it: every Markdown page that git tracks, its links, its code, its headings."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.processes import ROOT

TEMPLATES = "env_servers/scaffold/template/"
"""Pages of a project that `anchorage env new` makes: their paths are that project's."""
_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_QUOTED = re.compile(r"`([^`\n]+)`")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Page:
    """A Markdown file; `path` is relative to the repository."""

    path: str
    text: str

    @property
    def prose(self) -> str:
        """The text without its blocks of code."""
        return _FENCE.sub("", self.text)

    @property
    def links(self) -> list[str]:
        return _LINK.findall(_QUOTED.sub("", self.prose))

    @property
    def quoted(self) -> list[str]:
        """What stands in back-quotes within the prose."""
        return _QUOTED.findall(self.prose)

    @property
    def code_lines(self) -> list[str]:
        """The lines of all blocks of code; a line that ends with a backslash is joined with the next."""
        return [line.strip() for block in _FENCE.findall(self.text) for line in block.replace("\\\n", " ").splitlines()]

    @property
    def anchors(self) -> set[str]:
        """The fragments that headings can be linked by, as GitHub makes them."""
        return {
            re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")
            for heading in _HEADING.findall(self.prose)
        }


@cache
def tracked_files() -> frozenset[str]:
    """Every file that git tracks, or would: what is ignored is left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return frozenset(file for file in listed if (ROOT / file).is_file())


@cache
def tracked_folders() -> frozenset[str]:
    return frozenset(str(parent) for file in tracked_files() for parent in Path(file).parents)


@cache
def pages() -> tuple[Page, ...]:
    return tuple(
        Page(file, (ROOT / file).read_text())
        for file in sorted(tracked_files())
        if file.endswith(".md") and not file.startswith(TEMPLATES)
    )
