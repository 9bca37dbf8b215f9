"""`python -m bahe` is the command line."""

from bahe.cli import main

main()
