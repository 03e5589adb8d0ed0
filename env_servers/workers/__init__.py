"""Several processes behind one port: each session stays on the process that opened it."""
