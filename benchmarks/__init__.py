"""Every quoted figure, one command each: `python -m benchmarks.NAME [--quick] [--json PATH]`."""
