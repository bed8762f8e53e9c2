"""The command line: one file a verb, and the only place that wires the folders together."""

from ditf.cli.main import export_main, main

__all__ = ["export_main", "main"]
