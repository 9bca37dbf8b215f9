"""A planted world of people and things, and the log that they leave behind."""
