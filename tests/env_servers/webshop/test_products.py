"""Records become products by the rules of the original loader, and the official files are found and read."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from env_servers.environment import BrokenTask
from env_servers.webshop.official import load_official
from env_servers.webshop.products import Product, make_products

Record = Callable[..., dict[str, Any]]


def _one(record: dict[str, Any]) -> Product:
    (product,) = make_products([record], {}, {})
    return product


@pytest.mark.parametrize(
    ("pricing", "prices", "tag"),
    [
        ("$16.99", (16.99,), "$16.99"),
        ("$1,299.50$2,000", (1299.5, 2000.0), "$1299.5 to $2000.0"),
        ("$3$4$5", (3.0, 4.0), "$3.0 to $4.0"),
        ("", (100.0,), "$100.0"),
        (None, (100.0,), "$100.0"),
    ],
)
def test_prices(record: Record, pricing: str | None, prices: tuple[float, ...], tag: str) -> None:
    product = _one(record("B1", pricing=pricing))
    assert (product.prices, product.price_tag) == (prices, tag)


def test_options_are_normalised(record: Record) -> None:
    choices = {"Fit Type": [{"value": " Men/Women "}, {"value": "KIDS", "image": None}], "Color": None, "Size": []}
    assert _one(record("B1", customization_options=choices)).options == {
        "fit type": ("men | women", "kids"),
        "size": (),
    }


@pytest.mark.parametrize("choices", ["", None, {}])
def test_no_options(record: Record, choices: object) -> None:
    assert _one(record("B1", customization_options=choices)).options == {}


def test_texts(record: Record) -> None:
    product = _one(record("B1", small_description="One bullet", query=" Sofas "))
    assert (product.bullets, product.query, product.attributes) == (("One bullet",), "sofas", ("DUMMY_ATTR",))


def test_impossible_and_repeated_asins_are_left_out(record: Record) -> None:
    records = [record("nan"), record("B0000000012"), record("B1", "first"), record("B1", "second"), record("B2")]
    assert [(p.asin, p.title) for p in make_products(records, {}, {})] == [("B1", "first"), ("B2", "Wooden Lamp")]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pricing": "12 dollars"}, r"invalid record of product B1: IndexError"),
        ({"pricing": "$1.2.3"}, "invalid record of product B1: InvalidOperation"),
        ({"customization_options": {"Color": [{"image": ""}]}}, r"invalid record of product B1: KeyError: 'value'"),
        ({"asin": None}, "no asin"),
    ],
)
def test_unreadable_records_are_one_clear_line(record: Record, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BrokenTask, match=complaint) as raised:
        list(make_products([{**record("B1"), **change}], {}, {}))
    assert "\n" not in str(raised.value)


def _write(folder: Path, products: object, *, small: bool = True, packed: bool = False) -> None:
    middle = "_1000" if small else ""
    files = {
        f"items_shuffle{middle}.json": products,
        f"items_ins_v2{middle}.json": {"B1": {"attributes": ["small" if small else "full"]}},
        "items_human_ins.json": {
            "B2": [{"instruction": "i want it", "instruction_attributes": ["soft"], "instruction_options": []}]
        },
    }
    for name, content in files.items():
        text = json.dumps(content).encode()
        path = folder / (f"{name}.xz" if packed else name)
        path.write_bytes(lzma.compress(text) if packed else text)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_official_files(record: Record, tmp_path: Path, small: bool, packed: bool) -> None:
    _write(tmp_path, [record("B1"), record("B2"), record("B3")], small=small, packed=packed)
    products = load_official(tmp_path, 2, human=True)
    assert [product.asin for product in products] == ["B1", "B2"]
    assert products[0].attributes == ("small" if small else "full",)
    assert [instruction.text for instruction in products[1].human] == ["i want it"]
    assert load_official(tmp_path)[1].human == ()


def test_the_small_set_comes_first(record: Record, tmp_path: Path) -> None:
    _write(tmp_path, [record("B1")], small=False)
    _write(tmp_path, [record("B1"), record("B2")], small=True)
    products = load_official(tmp_path)
    assert (len(products), products[0].attributes) == (2, ("small",))


def test_missing_and_damaged_files(record: Record, tmp_path: Path) -> None:
    with pytest.raises(BrokenTask, match="not a directory"):
        load_official(tmp_path / "nowhere")
    with pytest.raises(BrokenTask, match=r"no items_shuffle_1000\.json or items_shuffle\.json in"):
        load_official(tmp_path)
    _write(tmp_path, [record("B1")])
    for damage in (b'[{"asin": ', b"no json"):
        (tmp_path / "items_shuffle_1000.json").write_bytes(damage)
        with pytest.raises(BrokenTask, match="cannot read items_shuffle_1000"):
            load_official(tmp_path)
    _write(tmp_path, [record("B1")], packed=True)
    (tmp_path / "items_shuffle_1000.json").unlink()
    whole = (tmp_path / "items_shuffle_1000.json.xz").read_bytes()
    (tmp_path / "items_shuffle_1000.json.xz").write_bytes(whole[:40])
    with pytest.raises(BrokenTask, match="cannot read items_shuffle_1000"):
        load_official(tmp_path)
