"""Routes for AgentGym's clients under `/agentgym`, in the same session table as all others."""
