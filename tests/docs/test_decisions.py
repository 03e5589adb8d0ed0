"""Decision records: numbered without gaps, dated, complete, and listed in their index."""

from __future__ import annotations

import re

from tests.docs.pages import Page, pages

FOLDER = "docs/decisions/"
SECTIONS = ["Context", "Decision", "Alternatives", "Consequences"]
RECORDS = [page for page in pages() if page.path.startswith(FOLDER) and page.path != f"{FOLDER}README.md"]
_STATUS = r"Date: \d{4}-\d\d-\d\d\. Status: (accepted|replaced by \[(\d{4})\]\(\S+\))\."


def number(record: Page) -> str:
    return record.path.removeprefix(FOLDER)[:4]


def title(record: Page) -> str:
    return record.text.partition("\n")[0].removeprefix(f"# {number(record)}. ")


def test_numbers_have_no_gaps_and_no_doubles() -> None:
    assert [int(number(record)) for record in RECORDS] == list(range(1, len(RECORDS) + 1))


def test_every_record_has_its_form() -> None:
    for record in RECORDS:
        assert record.text.startswith(f"# {number(record)}. "), record.path
        assert re.search(f"^{_STATUS}$", " ".join(record.text.splitlines()[2:4]).strip()), record.path
        assert re.findall(r"^## (.*)$", record.prose, re.MULTILINE) == SECTIONS, record.path


def test_the_index_lists_every_record_with_its_title_and_date() -> None:
    index = next(page for page in pages() if page.path == f"{FOLDER}README.md")
    rows = re.findall(r"^\| \[(\d{4})\]\((\S+)\) \| (.*) \| (\S+) \|$", index.text, re.MULTILINE)
    dates = {record.path: re.search(r"Date: (\S+)\.", record.text) for record in RECORDS}
    assert rows == [
        (number(record), record.path.removeprefix(FOLDER), title(record), date[1])
        for record in RECORDS
        if (date := dates[record.path])
    ]
