"""The command line: commands parse, call and print."""

from bahe.cli.commands import app, main

__all__ = ["app", "main"]
