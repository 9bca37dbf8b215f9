"""Behaviors sent to a running service: counts of what a user did have them until a publish does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feature_repo.behavior_counts import PAIR, counts_with, first_and_last
from feature_repo.by_item_columns import columns_counted
from feature_repo.item_keys import reference_of
from serving.live.push_log import Pushed
from serving.lookup.catalogue import Catalogue
from serving.lookup.identifiers import Identifier
from serving.lookup.online_features import OnlineFeatures
from serving.lookup.published_models import PublishedModels

if TYPE_CHECKING:
    from feast import FeatureStore


@dataclass(frozen=True)
class Act:
    """What a user did with some items."""

    of: Mapping[str, frozenset[Any]]
    """PAIR: the item, or all of the behavior's very text where it names none; by column of items that the
    model's counts are by, what these have there."""
    channel: str
    time_us: int


class LiveCounts:
    """Counts of what a user did with an item, and with the items that are like it in a column."""

    def __init__(
        self, store: FeatureStore, online: OnlineFeatures, models: PublishedModels, catalogue: Catalogue
    ) -> None:
        self._store, self._online, self._models, self._catalogue = store, online, models, catalogue
        self._columns: tuple[str, Sequence[str]] = ("", ())
        """A model_version, and the columns of items by which it reads what a user did."""

    def act(self, behavior: Pushed, version: str) -> Act:
        """What a behavior counts as under a model_version."""
        named = behavior.item_id
        items = [named] if named is not None else self._catalogue.with_text(behavior.text)
        of = {PAIR: frozenset(map(str, items))}
        columns = self._columns_counted(version)
        if items and columns:
            values = self._online.read(list(map(reference_of, columns)), {"item_id": items})
            of |= {column: frozenset(values[column]) - {None} for column in columns}
        return Act(of, behavior.channel, behavior.time_us)

    def add_to(
        self,
        values: Mapping[str, list[Any]],
        items: Sequence[Identifier],
        acts: Sequence[Act],
        version: str,
    ) -> None:
        """Add a user's acts to the features of some items with that user, by column, in place.

        All of them count in every window: a service is published to more often than once in the shortest.
        """
        channels = self._models.artifact(version).dense.channels
        _add(acts, PAIR, list(map(str, items)), channels, values)
        for column in self._columns_counted(version):
            _add(acts, column, values[column], (), values)

    def _columns_counted(self, version: str) -> Sequence[str]:
        """Columns of items by which the model reads what a user did."""
        known = self._columns  # another request may put another version's in its place
        if known[0] != version:
            by_attribute = self._models.inputs(version).references["attribute"]
            known = version, columns_counted(self._store, by_attribute)
            self._columns = known
        return known[1]


def _add(
    acts: Iterable[Act],
    of: str,
    candidates: Sequence[Any],
    channels: Sequence[str],
    values: Mapping[str, list[Any]],
) -> None:
    """Add to each candidate's columns of `values` the acts that it shares: those `of` the same thing.

    `channels` are those that are counted each by itself, too.
    """
    counts = counts_with(of, channels)
    shared: dict[Any, list[Act]] = {}
    for act in acts:
        for one in act.of.get(of, ()):
            shared.setdefault(one, []).append(act)
    for place, candidate in enumerate(candidates):
        its = shared.get(candidate)
        if its is None:
            continue
        for column, channel in counts.items():
            if column in values:
                came = sum(channel in (None, act.channel) for act in its)
                values[column][place] = (values[column][place] or 0) + came
        # Channels that are read apart may come out of order.
        times = [act.time_us for act in its]
        for column, chosen in zip(first_and_last(of), (min, max), strict=True):
            if column in values:
                stored = values[column][place]
                values[column][place] = chosen(times if stored is None else [stored, *times])
