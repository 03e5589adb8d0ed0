"""Every command of the documentation exists: `anchorage` and its options, `make` and its targets, keys of the tree."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin
from unittest import mock

import pytest
import yaml
from pydantic import BaseModel

from anchorage.cli.main import main
from env_servers.__main__ import main as serve
from services.config.tree import Config
from tests.docs.pages import Page, pages
from tests.processes import ROOT

PAGES = [pytest.param(page, id=page.path) for page in pages()]
_INVOKED = re.compile(r"(?:^|\s|/|\$ )anchorage((?: +\S+)*)")
_OVERRIDE = re.compile(r"([a-z_]+(?:\.[a-z_0-9]+)*)=")
_ENDS = ("|", "&&", ">", "#")


def words_of(line: str) -> list[str]:
    """The words after `anchorage` up to a comment, a pipe or the next command; none where the line runs no command."""
    found = _INVOKED.search(line.split(" # ")[0])
    if found is None:
        return []
    words = []
    for word in shlex.split(found[1].replace("[=auto]", "")):
        if word in _ENDS:
            break
        words.append(word)
    return words


def subcommand(words: list[str]) -> list[str]:
    """The leading words that name a command: `["env", "serve"]`."""
    groups = ("env", "model", "buffer", "pool", "config")
    return words[: 2 if words[0] in groups and len(words) > 1 else 1]


@cache
def help_of(command: tuple[str, ...]) -> tuple[int, str]:
    """Exit code and text of `anchorage COMMAND --help`, on a page so wide that nothing is cut."""
    page = io.StringIO()
    code: Any = 0
    width = mock.patch.dict(os.environ, {"COLUMNS": "400"})
    with width, contextlib.redirect_stdout(page), contextlib.redirect_stderr(page):
        try:
            if command == ("env", "serve"):  # the command becomes this program, in the process that it is
                serve(["--help"])
            else:
                main([*command, "--help"])
        except SystemExit as exit_:
            code = exit_.code or 0
    return code, page.getvalue()


def commands_of(page: Page) -> list[list[str]]:
    lines = [line for line in page.code_lines if re.match(r"(\$ |[A-Z_]+=\S+ +|\S*bin/)*anchorage ", line)]
    quoted = [text for text in page.quoted if re.match(r"([A-Z_]+=\S+ +)*anchorage [a-z]", text)]
    return [words for line in (*lines, *quoted) if (words := words_of(line))]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: Page) -> None:
    for words in commands_of(page):
        command = tuple(word for word in subcommand(words) if not word.startswith("-"))
        code, text = help_of(command)
        assert code == 0, f"anchorage {' '.join(words)}: {text}"
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"anchorage {' '.join(words)}"


def exists(key: str) -> bool:
    """Whether the tree has a field at this dotted path; below a mapping any name will do."""
    kinds: list[Any] = [Config]
    for part in key.split("."):
        fields = [kind.model_fields[part] for kind in kinds if _is_model(kind) and part in kind.model_fields]
        if not fields:
            return any(get_origin(kind) is dict for kind in kinds)
        kinds = [kind for field in fields for kind in _alternatives(field.annotation)]
    return True


def is_value_of_the_chart(key: str) -> bool:
    value = yaml.safe_load((ROOT / "deploy/helm/anchorage/values.yaml").read_text())
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _alternatives(part)]
    return [annotation]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


@pytest.mark.parametrize("page", PAGES)
def test_overrides_of_commands_are_keys_of_the_tree(page: Page) -> None:
    runs = [words for words in commands_of(page) if words[0] in ("train", "eval", "demo", "warmstart")]
    keys = [found[1] for words in runs for word in words[1:] if (found := _OVERRIDE.match(word))]
    assert not [key for key in keys if not exists(key)]


@pytest.mark.parametrize("page", PAGES)
def test_quoted_keys_are_keys_of_the_tree_or_values_of_the_chart(page: Page) -> None:
    sections = {name for name, field in Config.model_fields.items() if _is_model(field.annotation)}
    keys = [text.partition("=")[0].partition(":")[0] for text in page.quoted]
    keys = [key for key in keys if re.fullmatch(r"[a-z]+(\.[a-z_]+)+", key) and key.partition(".")[0] in sections]
    files = (".py", ".yaml", ".json", ".jsonl", ".url", ".id", ".md")
    keys = [key for key in keys if not key.endswith(files)]
    assert not [key for key in keys if not exists(key) and not is_value_of_the_chart(key)]


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make_exist(page: Page) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [*page.code_lines, *page.quoted]
    named = [found[1] for line in lines if (found := re.match(r"(?:[A-Z_]+=\S+ )*make ([a-z][\w-]*)", line))]
    assert not [target for target in named if target not in targets]


def test_what_does_not_exist_is_noticed() -> None:
    assert help_of(("nothing",))[0] != 0
    assert "--nothing" not in help_of(("eval",))[1]
    assert words_of("$ X=1 .venv/bin/anchorage eval --policy a | tail # --nothing") == ["eval", "--policy", "a"]
    assert exists("learner.updates")
    assert exists("model.lora.rank")
    assert not exists("learner.nothing")
    assert not exists("learner.updates.nothing")
