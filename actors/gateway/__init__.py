"""The recording gateway: an OpenAI-compatible server in a rollout actor's process, in front of its engine.

An unmodified agent program plays an episode through it; its calls become the steps of a trajectory: docs/agents.md.
"""
