"""Nothing that is shown holds a credential."""

from __future__ import annotations

import pytest

from services.config.masking import HIDDEN, masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://:word@example:6379/0", "redis://example:6379/0"),
        ("rediss://me:word@[::1]:6379/0?password=word#word", "rediss://[::1]:6379/0"),
        ("unix://me:word@/run/redis.sock?db=1", "unix:///run/redis.sock"),
        ("openenv+http://me:word@host:8001", "openenv+http://host:8001"),
        ("http://host:8001/path", "http://host:8001/path"),
        ("redis://:wo/rd@example:6379", HIDDEN),
        ("redis://:wo#rd@example:6379", HIDDEN),
        ("http://me:wo[rd@example", HIDDEN),
        ("no server at http://me:word@host:8001: refused", "no server at http://host:8001: refused"),
        ("two: http://a:b@c and http://d:e@f", "two: http://c and http://f"),
        ("got {'urls': ['http://me:word@b:2']}", "got {'urls': ['http://b:2']}"),
        ("at http://[::1]:8001: refused", "at http://[::1]:8001: refused"),
        ("['http://a:1','http://me:word@b:2']", "['(hidden)']"),
        ("nothing to hide, me@example", "nothing to hide, me@example"),
        (f"invalid key anc_{'x-' * 21}y: stop", f"invalid key {HIDDEN}: stop"),
    ],
)
def test_an_address_is_shown_without_its_credentials(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_a_tree_is_masked_in_every_place_and_left_as_it_is() -> None:
    tree = {
        "env": {"urls": ("http://me:word@a:1", "http://b:2"), "max_steps": 50},
        "model": {"max_response_tokens": 24, "api_key": "word", "token": None},
        "lists": [{"password": "word"}],
    }
    assert masked(tree) == {
        "env": {"urls": ["http://a:1", "http://b:2"], "max_steps": 50},
        "model": {"max_response_tokens": 24, "api_key": HIDDEN, "token": None},
        "lists": [{"password": HIDDEN}],
    }
    assert tree["env"]["urls"] == ("http://me:word@a:1", "http://b:2")  # type: ignore[index]
