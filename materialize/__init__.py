"""The jobs, a folder each, in the order in which data flows through them."""

# Files written by version 0.1 name the Feast plug-ins by modules of this package; feast_ducklake answers
# for them.
import feast_ducklake as feast_ducklake
