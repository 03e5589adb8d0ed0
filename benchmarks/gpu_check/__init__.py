"""`make gpu-check`: what only a machine with GPUs can show, as a table, a JSON file and an exit code.

Invariants
- Each group of checks runs in a process of its own with a time limit: a crash or a hang is one failed row.
- A check that cannot run says why (`skipped`); a figure without a bound is `measured`, and never counts as `ok`.
- The project's own code is checked (learner, engine, channels, `anchorage.train`), not copies of it.
- The JSON file holds no secrets, host names, addresses or folders of the user.
"""
