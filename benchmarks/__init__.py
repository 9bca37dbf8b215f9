"""Every figure that is quoted, one command each: `python -m benchmarks.NAME [--quick] [--json PATH]`."""
