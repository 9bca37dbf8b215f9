"""The lake: connections and transactions, what jobs remember of themselves, DuckDB's extensions."""
