"""What every room may use: errors, the home folder, threads and devices, progress and log lines.

This package imports none of the others, and nothing heavy at import time.
"""
