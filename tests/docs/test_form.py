"""The form of the documentation: tables hold figures, lines are short enough to read, words are the field's own."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import Page, pages

WIDTH = 120
GENERATED = ("docs/env-api.md", "docs/configuration.md")
RECORDS = ("docs/STATUS.md", *GENERATED)
"""Pages whose tables hold what was measured, or what a command wrote."""
PAGES = [pytest.param(page, id=page.path) for page in pages() if page.path not in RECORDS]
ODD = ("goes on", "go on", "anew", "can be had", "so-manieth", "looked after", "puts everything away", "trouble")


def too_long(line: str) -> list[str]:
    """Cells of a table's line that take more than two lines on a page."""
    cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
    return [cell.strip() for cell in cells if len(_shown(cell)) > WIDTH]


def _shown(cell: str) -> str:
    """A cell as it is read: links without their addresses."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell).strip()


@pytest.mark.parametrize("page", PAGES)
def test_tables_hold_no_paragraphs(page: Page) -> None:
    assert not [cell for line in page.prose.splitlines() if line.startswith("|") for cell in too_long(line)]


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_are_short(page: Page) -> None:
    lines = [line for line in page.prose.splitlines() if not line.startswith(("|", "![")) and "](http" not in line]
    assert not [line for line in lines if len(line) > WIDTH]


@pytest.mark.parametrize("page", PAGES)
def test_words_are_the_field_s_own(page: Page) -> None:
    text = " ".join(page.prose.split()).lower()
    assert not [word for word in ODD if re.search(rf"\b{word}\b", text)]


def test_a_paragraph_in_a_table_is_noticed() -> None:
    assert too_long(f"| short | {'x' * 121} |") == ["x" * 121]
    assert too_long(f"| [short]({'x' * 121}) | `a \\| b` |") == []
