"""Pages as text: what stands on them, and what the HTML parser would do to white space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from env_servers.webshop import pages
from env_servers.webshop.products import Product, make_products

Record = Callable[..., dict[str, Any]]


@pytest.fixture
def product(record: Record) -> Product:
    """A lamp whose texts try the parser."""
    awkward = record(
        "B1",
        "Lamp <b>&amp;</b>",
        full_description=" \n ",
        small_description=["", " ", "two\nlines ", "\n"],
        customization_options={"Color": [{"value": "Red"}, {"value": ""}], "Size": []},
    )
    (made,) = make_products([awkward], {"B1": {"attributes": ["soft", "warm"]}}, {})
    return made


def test_search_page() -> None:
    nodes = pages.search_page("Find me it")
    assert pages.render_text(nodes) == "WebShop [SEP] Instruction: [SEP] Find me it [SEP] Search"
    rich = pages.render_rich(nodes, lambda kind, text: False)
    assert rich == "WebShop\nInstruction: \nFind me it\n[button] Search [button_]\n"


@pytest.mark.parametrize(("page", "back"), [(0, ""), (1, ""), (2, "< Prev [SEP] ")])
def test_results_page(product: Product, page: int, back: str) -> None:
    text = pages.render_text(pages.results_page("It", [product], page, 50))
    assert text == (
        f"Instruction: [SEP] It [SEP] Back to Search [SEP] Page {page} (Total results: 50) [SEP] {back}Next > [SEP] "
        "B1 [SEP] Lamp <b>&amp;</b> [SEP] $20.0"
    )


def test_item_page(product: Product) -> None:
    nodes = pages.item_page("It", product, pages.SUB_PAGES)
    assert pages.render_text(nodes) == (
        "Instruction: [SEP] It [SEP] Back to Search [SEP] < Prev [SEP] color [SEP] red [SEP] size [SEP] "
        "Lamp <b>&amp;</b> [SEP] Price: $20.0 [SEP] Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] "
        "Attributes [SEP] Buy Now"
    )


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("Description", ""),
        ("Features", " [SEP]  [SEP]  [SEP] two\nlines"),  # empty and blank bullets become spaces, a newline alone goes
        ("Reviews", ""),
        (
            "Attributes",
            " [SEP] soft [SEP] warm [SEP] garden [SEP] table lamps [SEP] Home & Kitchen › Lighting › Table Lamps",
        ),
    ],
)
def test_sub_pages(product: Product, name: str, rest: str) -> None:
    head = "Instruction: [SEP] It [SEP] Back to Search [SEP] < Prev"
    assert pages.render_text(pages.item_sub_page("It", product, name)) == head + rest


def test_rich_text_marks_what_was_clicked(product: Product) -> None:
    item = pages.item_page("It", product, ())
    rich = pages.render_rich(item, lambda kind, text: (kind, text) == ("option", "red"))
    assert rich.startswith("You have clicked red.\nInstruction:\nIt\n[button] Back to Search [button_]\n")
    assert "\ncolor\n  [clicked button] red [clicked button_]\nsize\n" in rich
    found = pages.results_page("It", [product], 1, 1)
    for visited, mark in ((True, "clicked button"), (False, "button")):
        rich = pages.render_rich(found, lambda kind, text, visited=visited: visited)
        assert rich.endswith(f"\n\n[{mark}] B1 [{mark}_]\nLamp <b>&amp;</b>\n$20.0\n")
        assert not rich.startswith("You have clicked")


def test_done_page() -> None:
    text = pages.render_text(pages.done_page("B1", {"size": "<5>", "color": 'men\'s & "red" é'}, 2 / 3))
    chosen = r'{"color": "men\u0027s \u0026 \"red\" \u00e9", "size": "\u003c5\u003e"}'
    assert text.split(" [SEP] ") == [
        *("Thank you for shopping with us!", "Your code:", "None", "(Paste it in your MTurk interface.)"),
        *("Purchased", "asin", "B1", "options", chosen, "attrs", "None", "category", "None", "query", "None"),
        *("product category", "None", "Target", "asin", "options", "attrs", "price upper", "instuction text"),
        *("category", "product category", "query", "Goal", "None", "Reward", "Your score (min 0.0, max 1.0)"),
        *("0.6666666666666666", "Reward Details", "None"),
    ]
