"""Whether what was served is what training sees, and if not, why."""
