"""Point-in-time retrieval and materialization from DuckLake."""
