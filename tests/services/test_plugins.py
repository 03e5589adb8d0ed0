"""Loading of plug-ins: files, packages, parameters, and one clear line for everything that can be wrong."""

import re
import sys
from textwrap import dedent

import pytest

from services.config import load_config
from services.plugins import PluginError, load, make_importable


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """What a test makes importable ends with it."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def made(folder, text, name="mine.py"):
    (folder / name).write_text(dedent(text))
    return f"{folder / name}:mine"


def loaded(reference, params=None, arguments=("rows", "config")):
    return load("algorithm", reference, built_in={"abs": "operator:abs"}, arguments=arguments,
                params=params, params_key="advantage.params")  # fmt: skip


def refused(reference, params=None):
    with pytest.raises(PluginError) as caught:
        loaded(reference, params)
    return str(caught.value)


PLAIN = "def mine(rows, config):\n    return rows, config\n"
WITH_MODEL = """
    from __future__ import annotations
    from pydantic import BaseModel, Field

    class Params(BaseModel):
        alpha: float = Field(0.5, ge=0)
        depth: int = 1

    def mine(rows, config, params: Params):
        return params.alpha, params.depth
"""


def test_a_file_and_a_name_in_it(tmp_path):
    assert loaded(made(tmp_path, PLAIN)).call(1, 2) == (1, 2)


def test_a_file_is_imported_once_and_imports_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_the_plugin.py").write_text("VALUE = 7\n")
    reference = made(tmp_path, "import beside_the_plugin\nCALLS = []\ndef mine(rows, config):\n    return CALLS\n")
    assert loaded(reference).call(1, 2) is loaded(reference).call(1, 2)


def test_a_package_in_a_folder_of_the_configuration(tmp_path):
    package = tmp_path / "package_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import mine\n")
    (package / "inner.py").write_text(PLAIN)
    assert "neither installed" in refused("package_of_mine:mine")
    make_importable([tmp_path])
    assert loaded("package_of_mine.inner:mine").call(3, 4) == (3, 4)


def test_what_is_installed_is_found_before_a_folder(tmp_path):
    (tmp_path / "statistics.py").write_text("raise RuntimeError\n")
    make_importable([tmp_path])
    assert loaded("statistics:covariance").call([1, 2], [1, 2]) == 0.5


def test_parameters_arrive_as_the_model_or_as_the_mapping(tmp_path):
    assert loaded(made(tmp_path, WITH_MODEL), {"alpha": "0.25"}).call(0, 0) == (0.25, 1)
    reference = made(tmp_path, "def mine(rows, config, params):\n    return params\n", "mapping.py")
    assert loaded(reference, {"anything": [1]}).call(0, 0) == {"anything": [1]}
    assert loaded(reference).call(0, 0) == {}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def other(rows, config): ...", r"algorithm=\S+: \S+mine.py has no 'mine'"),
        ("def mein(rows, config): ...", "did you mean mein"),
        ("mine = 3", "mine is a int, not a function or class"),
        ("1 / 0", r"mine.py cannot be imported: ZeroDivisionError: division by zero \(mine.py:1\)"),
        ("import sys\nsys.exit(0)", r"mine.py cannot be imported: SystemExit: 0 \(mine.py:2\)"),
        ("def mine(:", r"cannot be imported: SyntaxError: .* \(mine.py:1\)"),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def mine(rows): ...", r"must take \(rows, config\), but too many positional arguments: it takes \(rows\)"),
        ("def mine(rows, config, more): ...", "missing a required argument: 'more'"),
        ("def mine(rows, config, params: Unknown): ...", "NameError"),
        ("from __future__ import annotations\ndef mine(rows, config, params: Unknown): ...", "cannot be resolved"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, text, line):
    found = refused(made(tmp_path, text + "\n"))
    assert len(found.splitlines()) == 1
    assert re.search(line, found), found


@pytest.mark.parametrize(
    ("reference", "line"),
    [
        ("/no/such/file.py:mine", "algorithm=/no/such/file.py:mine: no file /no/such/file.py"),
        ("no_such_module:mine", "no module 'no_such_module': it is neither installed nor in the recipe's folder"),
        ("json.no_such:mine", "no module 'json.no_such'"),
        ("json:lods", "json has no 'lods', did you mean loads?"),
        ("bas", "must be one of abs, or module:name, did you mean abs?"),
    ],
)
def test_what_is_not_there_is_one_line(reference, line):
    assert line in refused(reference)


def test_a_package_with_the_name_of_one_of_ours_is_said_to_have_it(tmp_path):
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "rules.py").touch()
    for number, line in enumerate(("import services.rules", "from services import rules")):
        (tmp_path / f"clashing{number}.py").write_text(line)
        make_importable([tmp_path])
        expected = f"its package 'services' in {tmp_path} has the name of one of Anchorage's; rename it"
        with pytest.raises(PluginError, match=re.escape(expected)):
            loaded(f"clashing{number}:mine")
    with pytest.raises(PluginError, match=re.escape(expected)):
        loaded("services.rules:mine")


@pytest.mark.parametrize(
    ("params", "lines"),
    [
        ({"alpah": 1}, ["advantage.params.alpah: algorithm=MINE has no such parameter, did you mean alpha?"]),
        ({"alpha": -1}, ["advantage.params.alpha: must be >= 0.0, got -1"]),
        ({"alpah": 1, "depth": 1.5, "alpha": -1}, [
            "advantage.params.alpah: algorithm=MINE has no such parameter, did you mean alpha?",
            "advantage.params.alpha: must be >= 0.0, got -1",
            "advantage.params.depth: must be a whole number, got 1.5",
        ]),
        ({"alpha": "much", "depth": 1.5}, [
            "advantage.params.alpha: must be a number, got 'much'",
            "advantage.params.depth: must be a whole number, got 1.5",
        ]),
    ],
)  # fmt: skip
def test_wrong_parameters_are_told_by_their_keys(tmp_path, params, lines):
    reference = made(tmp_path, WITH_MODEL)
    assert refused(reference, params).replace(reference, "MINE").splitlines() == lines


def test_parameters_that_nothing_takes_are_an_error(tmp_path):
    reference = made(tmp_path, PLAIN)
    assert f"advantage.params.alpha: algorithm={reference} takes no parameters" in refused(reference, {"alpha": 1})


def test_what_it_raises_is_told_with_its_line(tmp_path):
    reference = made(tmp_path, "def mine(rows, config):\n    return rows['x']\n")
    with pytest.raises(PluginError, match=r"algorithm=\S+: KeyError: 'x' \(mine.py:2\)"):
        loaded(reference).call({}, 1)


def test_files_are_relative_to_the_recipe_that_names_them(tmp_path, monkeypatch):
    recipes, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    (recipes / "base").mkdir(parents=True)
    elsewhere.mkdir()
    (recipes / "base" / "base.yaml").write_text("algorithm: ./mine.py:mine\n")
    (recipes / "top.yaml").write_text("extends: base/base.yaml\nrun: {name: top}\n")
    monkeypatch.chdir(elsewhere)
    config = load_config(recipes / "top.yaml")
    assert config.algorithm == f"{recipes}/base/mine.py:mine"
    assert config.plugins.folders == (recipes, recipes / "base", elsewhere)
    over = load_config(recipes / "top.yaml", ["algorithm=../mine.py:mine", f"plugins.folders=[{tmp_path}]"])
    assert (over.algorithm, over.plugins.folders) == (f"{tmp_path}/mine.py:mine", (tmp_path,))


def test_without_a_plugin_no_folder_is_recorded(tmp_path):
    (tmp_path / "plain.yaml").write_text("algorithm: grpo\n")
    assert load_config(tmp_path / "plain.yaml").plugins.folders == ()
