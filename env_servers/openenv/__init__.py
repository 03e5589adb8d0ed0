"""The OpenEnv protocol in both directions, spoken without the `openenv` package."""
