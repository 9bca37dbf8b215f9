"""Training frames: every impression with what was known strictly before it; frames as tensors."""
