"""What keeps a home small: merging the lake's files, dropping what nobody needs."""
