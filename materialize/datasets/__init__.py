"""Mappings of public logs, for `bahe fetch`."""
