"""A thin shim for AgentGym's clients: its routes under `/agentgym`, played in the same session table."""
