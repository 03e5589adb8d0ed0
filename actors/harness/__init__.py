"""Runs the user's agent program: a process for each episode."""
