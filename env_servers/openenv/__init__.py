"""The OpenEnv protocol, server and messages, without the `openenv` package."""
