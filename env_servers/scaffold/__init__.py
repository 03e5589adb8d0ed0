"""Makes the project of a new environment from a template that works: `python -m env_servers.scaffold NAME`."""
