"""Whether what is served equals what training would have seen: feature by feature, with the likely cause.

What was served comes from the log of requests, or from asking the online store now, about the users and
items of the newest impressions. What training would have seen is computed anew from the lake, as of each
request's moment and the `freshness` of dataset.yaml.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bahe_core.errors import BadInput, BaheError, NotReady
from bahe_core.home import Home
from bahe_core.machine import device
from bahe_core.progress import progress, say
from bahe_lake import runs
from bahe_lake.connection import lake
from bahe_models import column_of
from feature_repo.item_keys import reference_of
from feature_repo.store import online_errors, open_store
from materialize.config.dataset import home_dataset
from serving.audit.audit_result import EXAMPLES, Audit, Difference, FeatureAudit, together
from serving.audit.offline_truth import OfflineTruth, lengths_of
from serving.audit.skew import (
    LOOKED_AT,
    NOT_LOOKED_AT,
    VECTORS,
    Cause,
    edit_distance,
    equal_values,
    equal_vectors,
    item_vectors_if,
    largest_difference,
    likely_causes,
    published_before,
    smape,
    user_vectors_if,
    value_causes,
    vector_causes,
)
from serving.lookup.identifiers import Identifier
from serving.lookup.online_lookup import VECTOR, OnlineLookup
from serving.lookup.request_log import in_sample, read_requests

if TYPE_CHECKING:
    from bahe_models import Artifact

HISTORY = "user_recent_atoms:recent_atoms"


@dataclass(frozen=True, kw_only=True)
class _Served:
    """Rows of one model_version, as they were served."""

    model_version: str
    pairs: pa.Table
    """user_id, item_id, moment."""
    served_at: Sequence[datetime]
    values: Mapping[str, Sequence[Any]]
    """By `view:feature`."""
    user_NV: npt.NDArray[np.float32]
    """NaN where there was none."""
    item_NV: npt.NDArray[np.float32]


def audit(
    home: Home,
    *,
    requests: bool = False,
    last: int = 10_000,
    sample: float = 1.0,
    device_name: str | None = None,
) -> Audit:
    """Compare served features with those that training would have seen.

    `requests` reads the log of requests, the newest `last` pairs of user and item; otherwise the pairs of
    the `last` impressions are asked about now. `sample` is the share of users to look at, by a hash of
    their id. Raises NotReady when nothing is published or no request was logged, BadInput on numbers out
    of range.
    """
    if last < 1 or not 0 < sample <= 1:
        raise BadInput("an audit needs at least one row, and a sample above 0 and at most 1.")
    lookup, dataset = OnlineLookup(home), home_dataset(home)
    source = _of_requests(home, lookup, last, sample) if requests else None
    with lake(home) as connection, online_errors(home):
        if source is None:
            source = _asked_now(connection, lookup, last, sample)
        published = [
            run for run in runs.history(connection, "publish") if run.facts.get("model_version") is not None
        ]
        found: dict[str, list[FeatureAudit]] = {}
        ages: list[float] = []
        rows = 0
        left_out: list[str] = []
        store = open_store(home)
        for served in source:
            try:
                keys = lookup.models.inputs(served.model_version).item_keys
                truth = OfflineTruth(home, store, connection, served.pairs, dataset.freshness, keys)
                artifact = lookup.artifact(served.model_version)
                artifact.model.to(device(device_name))
                compared = list(_compared(home, connection, truth, served, artifact, published))
            except BaheError as error:  # a model that was dropped, or whose encoder was
                left_out.append(f"{len(served.pairs):,} pairs of {served.model_version}: {error}")
                continue
            rows += len(served.pairs)
            ages += [_age(moment, published) for moment in served.served_at]
            for one in compared:
                found.setdefault(one.feature, []).append(one)
    if not found:
        raise NotReady(f"nothing could be audited; {'; '.join(left_out) or 'no model is left'}")
    for sentence in left_out:
        say(f"  left out: {sentence}")
    known = [age for age in ages if not np.isnan(age)] or [float("nan")]
    return Audit(
        source="requests" if requests else "impressions",
        freshness=dataset.freshness,
        rows=rows,
        features=[together(parts) for parts in found.values()],
        staleness_p50_s=float(np.percentile(known, 50)),
        staleness_p99_s=float(np.percentile(known, 99)),
    )


def _of_requests(home: Home, lookup: OnlineLookup, last: int, sample: float) -> list[_Served]:
    logged = [r for r in read_requests(home, last) if r.item_ids and in_sample(r.user_id, sample)]
    if not logged:
        raise NotReady(
            f"{home.requests} has no logged requests; start the service with `bahe serve --log-requests 1`"
            " (or a share of the users), or leave out --requests."
        )
    logged.sort(key=lambda request: request.model_version)
    served = []
    for version, group in groupby(logged, key=lambda request: request.model_version):
        requests = list(group)
        counts = [len(request.item_ids) for request in requests]
        repeated = np.repeat(np.arange(len(requests)), counts)
        pairs = {
            "user_id": [requests[i].user_id for i in repeated],
            "item_id": [item for request in requests for item in request.item_ids],
            "moment": pa.array([requests[i].at for i in repeated], pa.timestamp("us", "UTC")),
        }
        try:
            inputs = lookup.models.inputs(version)
        except BaheError as error:
            say(f"  left out: {len(repeated):,} pairs of {version}: {error}")
            continue
        values: dict[str, Sequence[Any]] = {}
        references, vectors = inputs.references, inputs.vectors
        for reference in (*references["user"], *vectors["user"]):
            name = _logged_as(reference, vectors["user"])
            values[reference] = [requests[i].user.get(name) for i in repeated]
        of_items = [*vectors["item"], *vectors["pair"]]
        by_item = (*references["item"], *references["pair"], *references["attribute"])
        for reference in (*by_item, *of_items):
            name = _logged_as(reference, of_items)
            values[reference] = [
                value
                for request in requests
                for value in request.items.get(name, [None] * len(request.item_ids))
            ]
        served.append(
            _Served(
                model_version=version,
                pairs=pa.table(pairs),
                served_at=[requests[i].served_at for i in repeated],
                values=values,
                user_NV=np.stack([request.user_vector for request in requests])[repeated],
                item_NV=np.concatenate([request.item_vectors for request in requests]),
            )
        )
    return served


def _logged_as(reference: str, vectors: Collection[str]) -> str:
    """The name under which the log of requests has a feature."""
    return reference if reference in vectors else column_of(reference)


def _asked_now(
    connection: duckdb.DuckDBPyConnection, lookup: OnlineLookup, last: int, sample: float
) -> list[_Served]:
    version = lookup.live_version()
    newest = connection.execute(
        "SELECT user_id, item_id FROM impressions ORDER BY event_timestamp DESC, impression_id LIMIT ?",
        [last],
    ).to_arrow_table()
    chosen = [in_sample(user, sample) for user in newest["user_id"].to_pylist()]
    pairs = newest.filter(pa.array(chosen, pa.bool_()))
    if not len(pairs):
        raise NotReady("no impression is of a user in the sample; raise --last or --sample.")
    users, items = (pairs[f"{e}_id"].combine_chunks().dictionary_encode() for e in ("user", "item"))
    user_N, item_N = users.indices.to_numpy(), items.indices.to_numpy()
    ids: list[Identifier] = users.dictionary.to_pylist()
    found = lookup.users(ids, version)
    width = next((len(user.vector) for user in found if user is not None), 1)
    user_UV = np.full((len(ids), width), np.nan, dtype=np.float32)
    for place, user in enumerate(found):
        if user is not None:
            user_UV[place] = user.vector
    item_ids: list[Identifier] = items.dictionary.to_pylist()
    vectors, item_values = lookup.items(item_ids, version)
    item_IV = np.where(vectors.found_N[:, None], vectors.vectors_ND, np.float32(np.nan))
    if item_IV.shape[1] != width:  # none is online
        item_IV = np.full((len(item_ids), width), np.nan, dtype=np.float32)
    inputs = lookup.models.inputs(version)
    references = inputs.references
    values: dict[str, Sequence[Any]] = {}
    for reference in references["user"]:
        of_user = [None if user is None else user.statistics[column_of(reference)] for user in found]
        values[reference] = [of_user[i] for i in user_N]
    for reference in references["item"]:
        of_item = item_values[column_of(reference)]
        values[reference] = [of_item[i] for i in item_N]
    for reference in inputs.vectors["user"]:
        its_U = [None if user is None else _plain(user.vectors[reference]) for user in found]
        values[reference] = [its_U[i] for i in user_N]
    for reference in inputs.vectors["item"]:
        its_I = [_plain(vector) for vector in item_values[reference]]
        values[reference] = [its_I[i] for i in item_N]
    in_pairs = {key: pairs[key].to_pylist() for key in ("user_id", "item_id")}
    for reference, vectors_N in lookup.models.read_vectors("pair", version, in_pairs).items():
        values[reference] = [_plain(vector) for vector in vectors_N]
    columns = {name: values[reference_of(name)] for name in inputs.item_keys}
    by_attributes = lookup.models.read_by_attributes(version, {**columns, **in_pairs})
    values |= {one: by_attributes[column_of(one)] for one in references["attribute"]}
    if references["pair"]:
        of_pairs = lookup.online.read(references["pair"], pairs.to_pydict())
        values |= {reference: of_pairs[column_of(reference)] for reference in references["pair"]}
    histories = lookup.online.read([HISTORY], {"user_id": ids})[column_of(HISTORY)]
    values[HISTORY] = [histories[i] for i in user_N]
    now = datetime.now(UTC)
    moments = pa.array([now] * len(pairs), pa.timestamp("us", "UTC"))
    return [
        _Served(
            model_version=version,
            pairs=pairs.append_column("moment", moments),
            served_at=[now] * len(pairs),
            values=values,
            user_NV=user_UV[user_N],
            item_NV=item_IV[item_N],
        )
    ]


def _plain(vector: npt.NDArray[np.float32] | None) -> list[float] | None:
    return None if vector is None else vector.tolist()


def _compared(
    home: Home,
    connection: duckdb.DuckDBPyConnection,
    truth: OfflineTruth,
    served: _Served,
    artifact: Artifact,
    published: Sequence[runs.Run],
) -> Iterator[FeatureAudit]:
    references = list(served.values)
    offline = truth.values(references)
    with progress("features audited", len(references) + 2) as advance:
        differing = {
            reference: np.flatnonzero(
                [not equal_values(a, b) for a, b in zip(served.values[reference], values, strict=True)]
            )
            for reference, values in offline.items()
        }
        suspects = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *differing.values()]))
        suspects = suspects[:: max(1, -(-len(suspects) // LOOKED_AT))]
        causes: list[Cause] = []
        if len(suspects):
            wrong = [reference for reference, rows in differing.items() if len(rows)]
            causes = value_causes(truth, wrong, suspects, served.served_at, published)
        for reference, rows in differing.items():
            said = served.values[reference]
            named = likely_causes(reference, said, offline[reference], rows, suspects, causes)
            yield _feature(served, reference, said, offline[reference], rows, named)
            advance(1)
        channels = artifact.dense.channels
        everyone = np.arange(len(served.pairs))
        length_NC = lengths_of(offline, channels, len(everyone))
        want_NV = truth.user_vectors(artifact, length_NC, everyone)
        rows = np.flatnonzero(~equal_vectors(served.user_NV, want_NV))
        first = rows[:VECTORS]
        answered = published_before([served.served_at[i] for i in first], published)
        would_be = user_vectors_if(home, connection, truth, artifact, length_NC[first], first, answered)
        yield _vector(served, "user", served.user_NV, want_NV, rows, would_be)
        advance(1)
        want_NV = truth.item_vectors(artifact, everyone)
        rows = np.flatnonzero(~equal_vectors(served.item_NV, want_NV))
        would_be = item_vectors_if(connection, truth, artifact, rows[:VECTORS])
        yield _vector(served, "item", served.item_NV, want_NV, rows, would_be)
        advance(1)


def _feature(
    served: _Served,
    reference: str,
    said: Sequence[Any],
    offline: Sequence[Any],
    rows: npt.NDArray[np.int64],
    causes: Sequence[str],
) -> FeatureAudit:
    pairs = [(said[i], offline[i]) for i in rows]
    histories = [(a or [], b or []) for a, b in pairs] if reference == HISTORY else []
    return FeatureAudit(
        feature=reference,
        rows=len(said),
        differing=len(rows),
        missing=sum(a is None and b is not None for a, b in pairs),
        extra=sum(a is not None and b is None for a, b in pairs),
        largest_difference=largest_difference(said, offline),
        smape=smape(said, offline),
        edit_distance=(
            sum(edit_distance(a, b) for a, b in histories) / len(said) if reference == HISTORY else None
        ),
        causes=dict(Counter(causes)),
        examples=_examples(served, rows, causes, lambda i: (said[i], offline[i])),
    )


def _vector(
    served: _Served,
    entity: str,
    given_NV: npt.NDArray[np.float32],
    want_NV: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    would_be: Iterable[tuple[str, npt.NDArray[np.float32]]],
) -> FeatureAudit:
    """Of the rows that differ, the cause of the first VECTORS is looked for."""
    causes = vector_causes(given_NV[rows[:VECTORS]], would_be) if len(rows) else []
    causes += [NOT_LOOKED_AT] * (len(rows) - len(causes))
    gap_N = np.abs(given_NV - want_NV).max(axis=1)
    no_given, no_want = (np.asarray(np.isnan(v).any(axis=1)) for v in (given_NV, want_NV))
    known = gap_N[~np.isnan(gap_N)]
    return FeatureAudit(
        feature=f"{entity}_embedding:{VECTOR}",
        rows=len(given_NV),
        differing=len(rows),
        missing=int((no_given & ~no_want).sum()),
        extra=int((no_want & ~no_given).sum()),
        largest_difference=float(known.max()) if len(known) else None,
        smape=None,
        edit_distance=None,
        causes=dict(Counter(causes)),
        examples=_examples(
            served,
            rows,
            causes,
            lambda i: (
                "none" if no_given[i] else f"{gap_N[i]:.2g} off",
                "none" if no_want[i] else "vector",
            ),
        ),
    )


def _examples(
    served: _Served,
    rows: npt.NDArray[np.int64],
    causes: Sequence[str],
    both: Callable[[int], tuple[Any, Any]],
) -> list[Difference]:
    shown: list[int] = rows[:EXAMPLES].tolist()
    pairs = served.pairs.take(pa.array(shown, pa.int64())).to_pylist()
    examples = []
    for place, pair, cause in zip(shown, pairs, causes, strict=False):
        said, offline = both(place)
        examples.append(
            Difference(
                **pair, model_version=served.model_version, served=said, offline=offline, cause=cause
            )
        )
    return examples


def _age(moment: datetime, published: Sequence[runs.Run]) -> float:
    """Seconds since the publish that answered; NaN before the first that is known."""
    answered = next((run for run in published if run.finished <= moment), None)
    return float("nan") if answered is None else (moment - answered.finished).total_seconds()
