"""URL, key, prices and names of API models."""

from __future__ import annotations

from pathlib import Path

import pytest

from anchorage.api_models.settings import ApiOptions, Price, endpoint, model_name, parse_prices
from services.config import ConfigError

KEY = "sk-secret-0123456789"


def test_the_url_is_the_option_then_the_variable_then_openais() -> None:
    environment = {"OPENAI_BASE_URL": "http://here:1/v1", "OPENAI_API_KEY": KEY}
    assert endpoint(ApiOptions(url="http://there:2/v1"), environment).shown == "http://there:2/v1"
    assert endpoint(ApiOptions(), environment).shown == "http://here:1/v1"
    assert endpoint(ApiOptions(), {"OPENAI_API_KEY": KEY}).shown == "https://api.openai.com/v1"


def test_the_key_is_optional_but_at_openai_and_comes_from_a_variable_or_a_file(tmp_path: Path) -> None:
    assert endpoint(ApiOptions(url="http://here:1/v1"), {}).key is None
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        endpoint(ApiOptions(), {})
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    found = endpoint(ApiOptions(), {"OPENAI_API_KEY_FILE": str(file)})
    assert found.key is not None
    assert found.key.get_secret_value() == KEY
    assert KEY not in repr(found)
    assert KEY not in found.shown


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("here/v1", "is no address"),
        ("ftp://here/v1", "is no address"),
        ("http://here:port/v1", "is no address"),
        ("http://me:password@here/v1", "holds a user or a password"),
    ],
)
def test_a_url_that_is_none_is_refused_without_showing_it(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        endpoint(ApiOptions(url=url), {})
    assert "password@" not in str(refused.value)
    assert url not in str(refused.value)


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-ä", "sk-\x7f1"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigError, match="cannot") as refused:
        endpoint(ApiOptions(url="http://here/v1"), {"OPENAI_API_KEY": key})
    assert key not in str(refused.value)


def test_names() -> None:
    assert model_name("api:org/model:free") == "org/model:free"
    assert model_name("runs/api") is None
    for wrong in ("api:", "api: ", "api:a\nb", "api:a\udcff"):
        with pytest.raises(ConfigError, match="the model's name is missing"):
            model_name(wrong)


def test_prices() -> None:
    prices = parse_prices(["0.25,2", "large=3,15", "api:org/a=b=1,1"])
    assert prices == {"": Price(0.25, 2), "large": Price(3, 15), "org/a=b": Price(1, 1)}
    options = ApiOptions(prices=prices)
    assert options.price("large") == Price(3, 15)
    assert options.price("other") == Price(0.25, 2)
    assert ApiOptions().price("other") is None


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b", "nan,1", "-1,2", "inf,2", "model=", "model"])
def test_what_is_no_price(text: str) -> None:
    with pytest.raises(ConfigError, match="is no price: write IN,OUT"):
        parse_prices([text])


@pytest.mark.parametrize(
    "wrong", [{"at_once": 0}, {"at_once": 5000}, {"timeout_s": 0.0}, {"timeout_s": float("nan")}, {"route": "text"}]
)
def test_options_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ApiOptions(**wrong)  # type: ignore[arg-type]
