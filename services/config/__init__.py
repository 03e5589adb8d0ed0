"""The configuration tree and its loader."""

from services.config.load import ConfigError, dump_config, load_config, shown_config
from services.config.tree import Config

__all__ = ["Config", "ConfigError", "dump_config", "load_config", "shown_config"]
