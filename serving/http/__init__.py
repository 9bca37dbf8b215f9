"""The HTTP API: routes and their messages, what is refused, keys, processes, metrics."""
