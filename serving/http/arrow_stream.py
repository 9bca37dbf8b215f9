"""Tables in Arrow's IPC format, as they go over HTTP."""

from __future__ import annotations

import pyarrow as pa

ARROW = "application/vnd.apache.arrow.stream"
"""The media type."""


def stream_of(table: pa.Table) -> bytes:
    """The table as a stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def table_of(content: bytes) -> pa.Table:
    """The table of a stream. Raises ValueError on anything else."""
    try:
        with pa.ipc.open_stream(content) as reader:
            return reader.read_all()
    except OSError as error:  # cut off
        raise ValueError(str(error)) from None
