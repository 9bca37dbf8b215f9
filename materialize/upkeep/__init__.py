"""What keeps a home small: merging the lake's files, dropping models and vectors nobody needs."""
