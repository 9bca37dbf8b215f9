"""What answers online: the quality gate, publishing, the pointer."""
