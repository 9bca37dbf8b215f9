"""What the user says: dataset.yaml, and where the demo's log and model come from."""
