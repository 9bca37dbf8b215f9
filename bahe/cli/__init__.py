"""The command line: commands parse, call the project and print."""

# Imported in the order in which `bahe --help` lists the commands.
from bahe.cli import setup, log, jobs, pipeline, state, upkeep, online  # noqa: I001
from bahe.cli.program import app, main

__all__ = ["app", "jobs", "log", "main", "online", "pipeline", "setup", "state", "upkeep"]
