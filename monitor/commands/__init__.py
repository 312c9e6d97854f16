"""Handlers of the `rlvr` commands that belong to the monitor: f(argv) -> exit code."""
