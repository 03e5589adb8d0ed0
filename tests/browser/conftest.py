"""A control plane over a finished and a live run."""

from __future__ import annotations

from tests.control_server import buffer, folder, url

__all__ = ["buffer", "folder", "url"]
