"""The lake: connections and transactions, the table of runs, DuckDB's extensions."""
