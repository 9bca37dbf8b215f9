"""The Python interface: open a home and run its jobs; what a run and a night decide."""
