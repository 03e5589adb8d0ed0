"""Tells the author of a server whether it is fit for training: `python -m env_servers.conformance URL`."""
