"""The jobs, a folder each, in the order in which data flows through them."""
