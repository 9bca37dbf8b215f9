"""From a frame to a trained, measured and reported model."""
