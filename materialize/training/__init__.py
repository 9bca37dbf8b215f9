"""From a frame to a trained, measured and reported model; frames as tensors for other models."""
