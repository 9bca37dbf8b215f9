"""From raw files to the lake: atoms, timelines, statistics, quarantine."""
