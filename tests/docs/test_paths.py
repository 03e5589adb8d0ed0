"""Every link of the documentation resolves, and every path of the repository that it or a docstring names exists."""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urldefrag

import pytest

from tests.docs.pages import TEMPLATES, Page, pages, tracked_files, tracked_folders
from tests.processes import ROOT

PAGES = [pytest.param(page, id=page.path) for page in pages()]
ROOMS = frozenset(file.partition("/")[0] for file in tracked_files() if "/" in file)
MADE_LATER = ("models/", "deploy/secrets/", "rock_paper/")
"""Folders in which a user's own files are named; what the repository holds of them is checked by links and tests."""
_PATH = re.compile(r"\.?\w[\w.*-]*(?:/[\w.*-]+)*/?")
_IN_FOLDER = re.compile(r"((?:`[\w./]+`, )*`[\w./]+`) in `([\w/]+/)`")
_PAGE_NAMED = re.compile(r"\bdocs/[\w/-]+\.md\b")


def missing(name: str) -> bool:
    """Whether `name` reads as a path of this repository, or as the name of one of its modules, and is neither."""
    name = name.split("::")[0]
    if not _PATH.fullmatch(name) or name.startswith(MADE_LATER) or re.search(r"(^|/)[A-Z]+(\.|/|$)", name):
        return False
    if name.partition("/")[0] not in ROOMS:  # the end of a path, or something else altogether
        return name.endswith(".py") and not any(f"/{file}".endswith(f"/{name}") for file in tracked_files())
    return not any(fnmatch.fnmatch(known, name.rstrip("/")) for known in (*tracked_files(), *tracked_folders()))


def docstrings(file: Path) -> Iterator[str]:
    """Docstrings of a module's, its classes' and functions', and strings that stand below a name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: Page) -> None:
    anchors = {other.path: other.anchors for other in pages()}
    dead = []
    for link in page.links:
        if re.match(r"[a-z]+:", link):
            continue
        target, fragment = urldefrag(link)
        file = (ROOT / page.path).parent.joinpath(target).resolve() if target else ROOT / page.path
        if not file.exists() or (fragment and fragment not in anchors[str(file.relative_to(ROOT))]):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("page", PAGES)
def test_named_paths_exist(page: Page) -> None:
    assert not [name for name in page.quoted if missing(name)]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_with_their_folder_are_in_it(page: Page) -> None:
    """As in "`play.py`, `reward.py` in `env_servers/webshop/`"."""
    named = [folder + name.strip("`") for names, folder in _IN_FOLDER.findall(page.prose) for name in names.split(", ")]
    assert not [path for path in named if path.partition("/")[0] in ROOMS and missing(path)]


def test_docstrings_name_paths_that_exist() -> None:
    modules = [file for file in sorted(tracked_files()) if file.endswith(".py") and not file.startswith(TEMPLATES)]
    assert not [
        (module, name)
        for module in modules
        for text in docstrings(ROOT / module)
        for name in re.findall(r"`([^`\n]+)`", text)
        if "/" in name and missing(name)
    ]


def test_pages_that_any_file_names_exist() -> None:
    texts = [file for file in sorted(tracked_files()) if Path(file).suffix in (".py", ".yaml", ".yml", ".toml", ".md")]
    named = {(file, page) for file in texts for page in _PAGE_NAMED.findall((ROOT / file).read_text())}
    assert named
    assert not [(file, page) for file, page in sorted(named) if page not in tracked_files()]


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("learner/trainer.py", False),
        ("learner/", False),
        ("tests/docs/test_*.py", False),
        ("learner/advantages/NAME.py", False),
        ("runs/demo/report.html", False),
        ("trainer.py", False),
        ("rank/losses.py", False),
        ("loss/kl", False),
        ("learner/nothing.py", True),
        ("services/nothing/", True),
        ("nothing_at_all.py", True),
        ("ranks/losses.py", True),
    ],
)
def test_what_counts_as_missing(name: str, verdict: bool) -> None:
    assert missing(name) is verdict


def test_headings_are_linked_as_github_links_them() -> None:
    text = "# The `gap`, explained\n\n```\n# no heading\n```\n## What was run, and where\n"
    assert Page("x.md", text).anchors == {"the-gap-explained", "what-was-run-and-where"}
