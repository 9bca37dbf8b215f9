"""Feast's local provider, with rows that are written online converted exactly or refused."""

from __future__ import annotations

from typing import Any

import pandas as pd
from feast.infra.passthrough_provider import PassthroughProvider

from feast_ducklake.conversion import arrow_table, arrow_type, converted_table


class StrictProvider(PassthroughProvider):
    """A `provider` of feature_store.yaml: `push` and `write_to_online_store` change no value.

    Feast converts what is written online before the online store sees it: 3.7 in an Int64 feature becomes
    3, "7" becomes 7. Here each value fits its feature or join key exactly, or the whole frame is refused
    with BadInput and nothing is written.
    """

    def ingest_df(self, feature_view: Any, df: pd.DataFrame, field_mapping: Any = None) -> None:
        """Write a frame to the online store. Raises BadInput."""
        super().ingest_df(feature_view, _exact(feature_view, df), field_mapping)

    async def ingest_df_async(self, feature_view: Any, df: pd.DataFrame, field_mapping: Any = None) -> None:
        """`ingest_df` without blocking the event loop."""
        await super().ingest_df_async(feature_view, _exact(feature_view, df), field_mapping)


def _exact(view: Any, frame: pd.DataFrame) -> pd.DataFrame:
    """The frame in the types of the view's join keys and features, whose columns may bear their source's
    names."""
    source = getattr(view, "batch_source", None)
    in_source = {shown: column for column, shown in (source.field_mapping if source else {}).items()}
    types = {}
    for field in [*view.entity_columns, *view.features]:
        kind = arrow_type(field.dtype.to_value_type())
        if kind is not None:
            types[field.name] = types[in_source.get(field.name, field.name)] = kind
    what = f"rows for view {view.name}"
    table = converted_table(arrow_table(frame, what), types, what)
    exact: pd.DataFrame = table.to_pandas(types_mapper=pd.ArrowDtype)
    return exact
