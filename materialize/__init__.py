"""What is computed, and when: the jobs from raw log to published vectors, and the Feast plug-ins."""
