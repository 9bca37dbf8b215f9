"""Online stores that write and read Feast's own bytes without a Python object per value."""
