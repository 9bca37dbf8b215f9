"""From frame and lake to a trained, measured model."""
