"""Models behind an OpenAI-compatible HTTP API, as players on the evaluation panels."""
