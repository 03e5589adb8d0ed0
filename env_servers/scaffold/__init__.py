"""Creates the project of a new environment from a working template: `python -m env_servers.scaffold NAME`."""
