"""What the trainer reads: atom vectors, timelines and impressions, as arrays.

Nothing here knows where the arrays come from. Shape letters: A atoms, D width, I items, N
impressions, C channels, X context columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from bahe_core.errors import BadInput
from bahe_models.features import column_of, needed_columns
from bahe_models.given_vectors import Matrix, check_vectors
from bahe_models.timelines import Int64, Timelines


@dataclass(frozen=True, kw_only=True)
class Impressions:
    """One split of a training frame, in time order. Users and items are rows, not ids."""

    user_N: Int64
    item_N: Int64
    """For an item whose text changed, the row of its text at that moment."""
    length_NC: Int64
    """Behaviors strictly before the impression, per channel."""
    time_us_N: Int64
    clicked_N: npt.NDArray[np.float32]
    columns: Mapping[str, npt.NDArray[np.float64]]
    """Statistics, NaN where unknown; see `needed_columns`."""
    context_NX: Int64 | None = None
    """Hashes of the context columns (`bahe_models.context`); None in a log without any."""
    vectors: Mapping[str, Matrix] = field(default_factory=dict)
    """Vectors of the feature store [N, D], by `view:feature`; NaN where unknown."""

    def __len__(self) -> int:
        return len(self.user_N)

    def take(self, rows: Int64) -> Impressions:
        """A subset, in the order of `rows`."""
        return Impressions(
            user_N=self.user_N[rows],
            item_N=self.item_N[rows],
            length_NC=self.length_NC[rows],
            time_us_N=self.time_us_N[rows],
            clicked_N=self.clicked_N[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
            context_NX=None if self.context_NX is None else self.context_NX[rows],
            vectors={name: values[rows] for name, values in self.vectors.items()},
        )

    @classmethod
    def together(cls, parts: Sequence[Impressions]) -> Impressions:
        """Splits one after the other."""
        contexts = [part.context_NX for part in parts if part.context_NX is not None]
        return cls(
            user_N=np.concatenate([part.user_N for part in parts]),
            item_N=np.concatenate([part.item_N for part in parts]),
            length_NC=np.concatenate([part.length_NC for part in parts]),
            time_us_N=np.concatenate([part.time_us_N for part in parts]),
            clicked_N=np.concatenate([part.clicked_N for part in parts]),
            columns={
                name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns
            },
            context_NX=np.concatenate(contexts) if contexts else None,
            vectors={
                name: np.concatenate([part.vectors[name] for part in parts]) for name in parts[0].vectors
            },
        )


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Everything one training run reads."""

    atoms_AD: npt.NDArray[np.float32]
    """Vectors of one encoder_version."""
    atom_ids: Int64
    """The id of each atom, the same in every frame and lake [A]."""
    timelines: Timelines
    item_atom_I: Int64
    """Row of each item's text in `atoms_AD`; an item whose text changed has a row for each text."""
    item_ids: tuple[str | int, ...]
    """The id of each item row; rows of one item stand side by side."""
    splits: Mapping[str, Impressions]
    """`train`, `validation` and `test`."""
    context: tuple[str, ...] = ()
    """Names of the context columns."""
    numeric: tuple[str, ...] = ()
    """Further dense features, as `view:feature`, each with its column in the splits."""
    vectors: Mapping[str, int] = field(default_factory=dict)
    """Widths of the vectors of the feature store that the splits have, by `view:feature`."""

    def known_lengths(self) -> Int64:
        """How much of each timeline training may read, [users, C].

        What follows a user's last training impression belongs to validation or test.
        """
        train = self.splits["train"]
        lengths_UC = np.zeros_like(self.timelines.lengths())
        np.maximum.at(lengths_UC, train.user_N, train.length_NC)
        return lengths_UC

    def all_to_train_on(self) -> TrainingData:
        """The same with every impression in the split `train`; there is nothing left to validate on."""
        parts = [self.splits[name] for name in ("train", "validation", "test")]
        return replace(self, splits={**self.splits, "train": Impressions.together(parts)})

    def check(self) -> None:
        """Raises BadInput before any step is taken when the data cannot be trained on."""
        if not np.isfinite(self.atoms_AD).all():
            bad = int((~np.isfinite(self.atoms_AD).all(axis=1)).sum())
            raise BadInput(f"{bad} atom vectors hold NaN or infinity; encode them again.")
        for channel, atoms in zip(self.timelines.channels, self.timelines.atoms, strict=True):
            self._check_rows(atoms, len(self.atoms_AD), f"the {channel} timelines", "atoms")
        self._check_rows(self.item_atom_I, len(self.atoms_AD), "the items' texts", "atoms")
        for name in ("train", "validation", "test"):
            self._check_split(name, self.splits[name])

    def _check_split(self, name: str, split: Impressions) -> None:
        needed = [*needed_columns(), *map(column_of, self.numeric)]
        missing = [c for c in needed if c not in split.columns]
        if missing:
            raise BadInput(
                f"the frame has no column {missing[0]}; pull it with the feature service ctr_training."
            )
        for column in needed:  # NaN is allowed: it means unknown
            if np.isinf(split.columns[column]).any():
                raise BadInput(f"{column} is infinite in the {name} split; pull the frame again.")
        hashed = 0 if split.context_NX is None else split.context_NX.shape[1]
        if hashed != len(self.context):
            raise BadInput(
                f"the {name} split has {hashed} context columns, not {len(self.context)}; pull the frame"
                " again."
            )
        check_vectors(self.vectors, split.vectors, len(split))
        if not np.isin(split.clicked_N, (0.0, 1.0)).all():
            raise BadInput(f"clicked is not 0 or 1 everywhere in the {name} split.")
        if len(np.unique(split.clicked_N)) < 2:
            raise BadInput(f"the {name} split has only one class; move the cut-offs under `split`.")
        self._check_rows(split.user_N, self.timelines.users, f"the {name} split", "users")
        self._check_rows(split.item_N, len(self.item_atom_I), f"the {name} split", "items")
        if (split.length_NC < 0).any():
            raise BadInput(f"the {name} split has negative timeline lengths; pull the frame again.")
        available_NC = self.timelines.lengths()[split.user_N]
        if (split.length_NC > available_NC).any():
            raise BadInput(
                f"the {name} split points beyond a timeline's end; the frame is newer than the"
                " timelines, so pull it again."
            )

    @staticmethod
    def _check_rows(rows: Int64, count: int, source: str, kind: str) -> None:
        bad = rows[(rows < 0) | (rows >= count)]
        if len(bad):
            raise BadInput(
                f"{len(bad)} rows of {source} point to {kind} that do not exist (row {bad[0]}, of {count});"
                " read both from the same state of the log."
            )
