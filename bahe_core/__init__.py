"""What every other package may use: errors, the home folder, the machine's threads and devices.

This package imports none of the others, and nothing heavy at import time.
"""
