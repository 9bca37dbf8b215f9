"""What answers online: the quality gate, publishing, the pointer and its rollback."""
