"""The lake: where it lies, connections and transactions, what jobs remember of themselves, extensions."""
