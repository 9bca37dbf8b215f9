"""How wide the vectors of `features.vectors` are, by what their sources hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import duckdb

from bahe_core.errors import BadInput, one_line
from bahe_lake.sql import sql_identifier
from bahe_models import column_of
from feature_repo.references import view_of

if TYPE_CHECKING:
    from feast import FeatureStore


def vector_widths(store: FeatureStore, references: Sequence[str]) -> dict[str, int]:
    """The width of each of these features (`view:feature`), in their order.

    Raises BadInput on a source that cannot be read, holds no vector, vectors of several widths, or one with
    a value that is no finite number.
    """
    from feast_ducklake import open_lake
    from feast_ducklake.offline.source import relation_of

    if not references:
        return {}
    widths: dict[str, int] = {}
    with open_lake(store.config) as connection:
        for reference in references:
            source = store.get_feature_view(view_of(reference)).batch_source
            feature = column_of(reference)
            in_source = {shown: column for column, shown in source.field_mapping.items()}
            column = sql_identifier(in_source.get(feature, feature))
            query = f"""
                SELECT
                    min(len({column})),
                    max(len({column})),
                    count(*) FILTER (
                        len(list_filter({column}, lambda x: x IS NULL OR NOT isfinite(x::DOUBLE))) > 0
                    )
                FROM {relation_of(source, store.config)}
                """
            try:
                row = connection.execute(query).fetchone()
            except duckdb.Error as error:
                raise BadInput(
                    f"features.vectors: the source of {reference} cannot be read ({one_line(error)});"
                    " correct it in feature_repo, then run `bahe apply`."
                ) from None
            assert row is not None
            widths[reference] = _width(reference, *row)
    return widths


def _width(reference: str, narrowest: int | None, widest: int | None, broken: int) -> int:
    if narrowest is None or widest is None:
        raise BadInput(
            f"features.vectors: {reference} has no vector yet; fill its source, or take it out of the list."
        )
    if narrowest != widest:
        raise BadInput(
            f"features.vectors: {reference} has vectors of {narrowest} and of {widest} numbers; a model"
            " reads one width, so write them all in one."
        )
    if not widest:
        raise BadInput(f"features.vectors: {reference} has vectors of 0 numbers; fill them.")
    if broken:
        raise BadInput(
            f"features.vectors: {reference} has {broken:,} vectors with a value that is no finite number; a"
            " vector that is not known is null as a whole."
        )
    return widest
