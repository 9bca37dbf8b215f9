"""Point-in-time training frames, by reference."""
