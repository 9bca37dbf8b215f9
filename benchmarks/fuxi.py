"""FuxiCTR's DIN and DCNv2 on BAHE's training data; run as a program, it repeats their tuning.

FuxiCTR (github.com/reczoo/FuxiCTR; Zhu et al., SIGIR 2022) provides networks, embeddings, optimiser,
trainer and early stopping. This module feeds it: ids, context, the statistics that our networks get, and
the latest behaviors of each channel as a sequence that ends with the candidate. Ids unseen in training
share one row.

Shape letters: N impressions, H behaviors of a sequence, A atoms, F dense features, X context columns.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from bahe_core.errors import NotReady
from bahe_core.home import Home
from bahe_core.progress import say
from benchmarks.harness import Row, main

if TYPE_CHECKING:
    import duckdb
    import torch

    from bahe_models import Impressions, Int64, TrainingData
    from bahe_models.trainer.ctr_training import Scores

Network = Literal["DIN", "DCNv2"]
HISTORY = 50
"""Latest behaviors of each channel, as many as our own DIN reads."""
PADDING, UNKNOWN, FIRST = 0, 1, 2
"""Rows of every table of ids; known ids begin at `FIRST`."""
LABEL = "clicked"
INSTALL = "pip install -e '.[bench]'"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is tuned. The defaults are FuxiCTR's own, where it has any."""

    embedding_dim: int = 16
    learning_rate: float = 1e-3
    batch_size: int = 1024
    embedding_regularizer: float = 0.0
    """Weight of the squared norm of the embeddings in the loss."""
    net_dropout: float = 0.0
    hidden_units: tuple[int, ...] = (512, 128, 64)
    """Of the DNN, which in DCNv2 is parallel to the cross network."""
    batch_norm: bool = False
    evaluations: int = 1
    """Evaluations on validation per epoch; training ends after two in a row without a better AUC."""
    users: bool = True
    """Whether the user's id is a feature."""
    history: int = HISTORY
    """Latest behaviors of each channel that the network reads."""
    behavior: tuple[str, ...] = ("item", "channel")
    """What is known of a behavior: `item` (in the table of the candidates), `channel`, `atom`."""
    network: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that only this network has."""


class Encoder:
    """Turns splits into FuxiCTR's features. Known ids are those of the training split."""

    def __init__(self, data: TrainingData, item_A: Int64, setting: Setting) -> None:
        """`item_A` comes from `behavior_items`."""
        from bahe_models import fit_dense
        from bahe_models.trainer.ctr_training import id_rows

        def table_rows(seen: Int64, size: int) -> Int64:
            # id_rows has 0 for unseen ids; here that row is padding.
            return id_rows(seen, size) + UNKNOWN

        self.data, self.setting, self.item_A = data, setting, item_A
        self.dense = fit_dense(data)
        train = data.splits["train"]
        recent_NH = self._recent(train)
        atoms = np.unique(recent_NH[recent_NH >= 0])
        items = item_A[atoms]
        self._user = table_rows(train.user_N, data.timelines.users)
        self._item = table_rows(np.concatenate([train.item_N, items[items >= 0]]), len(data.item_ids))
        self._atom = table_rows(atoms, len(item_A))
        self._context = [np.unique(hashes) for hashes in _context(train).T]

    def sequences(self, split: Impressions) -> tuple[dict[str, Int64], npt.NDArray[np.bool_]]:
        """Ids of each feature of behaviors [N, H + 1], the candidate's last, and which are present [N, H].

        Behaviors are strictly before the impression and stand channel by channel, from old to new.
        Padding is in front, so that a batch need only be as wide as its longest sequence.
        """
        recent_NH = self._recent(split)
        channels = len(self.data.timelines.channels)
        channel_NH = np.broadcast_to(np.repeat(np.arange(channels), self.setting.history), recent_NH.shape)
        order = np.argsort(recent_NH >= 0, axis=1, kind="stable")
        recent_NH = np.take_along_axis(recent_NH, order, axis=1)
        channel_NH = np.take_along_axis(channel_NH, order, axis=1)
        item_NH = self.item_A[recent_NH]
        behaviors = {
            "item": np.where(item_NH >= 0, self._item[item_NH], UNKNOWN),
            "channel": FIRST + channel_NH,
            "atom": self._atom[recent_NH],
        }
        candidate = {
            "item": self._item[split.item_N],
            "channel": np.full(len(split), FIRST + channels),
            "atom": np.full(len(split), UNKNOWN),
        }
        present_NH = recent_NH >= 0
        return {
            name: np.column_stack([np.where(present_NH, behaviors[name], PADDING), candidate[name]])
            for name in self.setting.behavior
        }, present_NH

    def columns(self, split: Impressions) -> dict[str, npt.NDArray[Any]]:
        """All other features and the label, [N] each."""
        columns: dict[str, npt.NDArray[Any]] = {}
        if self.setting.users:
            columns["user"] = self._user[split.user_N]
        for name, hash_N, known_hashes in zip(
            self.data.context, _context(split).T, self._context, strict=True
        ):
            place_N = np.minimum(np.searchsorted(known_hashes, hash_N), len(known_hashes) - 1)
            is_known_N = known_hashes[place_N] == hash_N
            columns[f"context_{name}"] = np.where(is_known_N, FIRST + place_N, UNKNOWN)
        dense_NF = self.dense.transform(split.columns, split.length_NC, split.time_us_N)
        return columns | dict(zip(self.dense.names, dense_NF.T, strict=True)) | {LABEL: split.clicked_N}

    def feature_map(self) -> Any:
        """FuxiCTR's description of the features."""
        from fuxictr.features import FeatureMap

        def ids(source: str, rows: int) -> dict[str, Any]:
            return {"type": "categorical", "source": source, "vocab_size": rows, "padding_idx": PADDING}

        features: OrderedDict[str, dict[str, Any]] = OrderedDict()
        if self.setting.users:
            features["user"] = ids("user", int(self._user.max()) + 1)
        for name, known_hashes in zip(self.data.context, self._context, strict=True):
            features[f"context_{name}"] = ids("context", FIRST + len(known_hashes))
        for name in self.dense.names:
            features[name] = {"type": "numeric", "source": "context"}
        rows = {
            "item": int(self._item.max()) + 1,
            "channel": FIRST + len(self.data.timelines.channels) + 1,
            "atom": int(self._atom.max()) + 1,
        }
        for name in self.setting.behavior:
            features[name] = ids("item", rows[name])
        feature_map = FeatureMap("bahe", data_dir="")
        feature_map.features, feature_map.labels = features, [LABEL]
        feature_map.default_emb_dim = self.setting.embedding_dim
        return feature_map

    def _recent(self, split: Impressions) -> Int64:
        """Atoms [N, H] from old to new, channel by channel; -1 where there is none."""
        from bahe_models.target import recent_behaviors

        timelines, history = self.data.timelines, self.setting.history
        latest_NH = recent_behaviors(timelines, split.user_N, split.length_NC, history)
        by_channel = latest_NH.reshape(len(split), len(timelines.channels), history)
        return by_channel[:, :, ::-1].reshape(len(split), -1)


def _context(split: Impressions) -> Int64:
    return np.empty((len(split), 0), dtype=np.int64) if split.context_NX is None else split.context_NX


class Batches:
    """A split as FuxiCTR's networks for long sequences read it: columns, sequences and their mask."""

    def __init__(
        self, encoder: Encoder, split: Impressions, *, rng: np.random.Generator | None = None
    ) -> None:
        """With `rng` the order is random, and differs in each epoch."""
        import torch

        rows, present_NH = encoder.sequences(split)
        self._rows = {name: torch.from_numpy(rows_NH) for name, rows_NH in rows.items()}
        self._present_NH = torch.from_numpy(present_NH)
        self._columns = {
            name: torch.from_numpy(np.ascontiguousarray(column_N))
            for name, column_N in encoder.columns(split).items()
        }
        self._size, self._batch_size, self._rng = len(split), encoder.setting.batch_size, rng

    def __len__(self) -> int:
        return -(-self._size // self._batch_size)

    def __iter__(
        self,
    ) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]]:
        import torch

        order = np.arange(self._size) if self._rng is None else self._rng.permutation(self._size)
        for begin in range(0, self._size, self._batch_size):
            members = torch.from_numpy(order[begin : begin + self._batch_size])
            present_NH = self._present_NH[members]
            longest = int(present_NH.sum(dim=1).max()) if present_NH.shape[1] else 0
            first = present_NH.shape[1] - longest
            yield (
                {name: column_N[members] for name, column_N in self._columns.items()},
                {name: rows_NH[members, first:].flatten() for name, rows_NH in self._rows.items()},
                present_NH[:, first:].float(),
            )


def behavior_items(connection: duckdb.DuckDBPyConnection, data: TrainingData) -> Int64:
    """The item row that each atom is about [A], -1 where the log does not say.

    Items with the same text share atoms; the one with most behaviors is taken.
    """
    item_of_atom: dict[int, str | int] = dict(
        connection.execute(
            "SELECT atom_id, item_id FROM behaviors WHERE item_id IS NOT NULL GROUP BY ALL"
            " ORDER BY count(*), item_id DESC"
        ).fetchall()
    )
    row = {item: place for place, item in enumerate(data.item_ids)}
    items = (item_of_atom.get(atom) for atom in data.atom_ids.tolist())
    return np.array([-1 if item is None else row.get(item, -1) for item in items], dtype=np.int64)


def train_fuxi(
    network: Network, data: TrainingData, item_A: Int64, setting: Setting, *, seed: int, epochs: int = 20
) -> Callable[[Impressions], Scores]:
    """Train with FuxiCTR's trainer; returns the scoring function (click probabilities).

    It stops early by the AUC on validation and restores the best weights. `item_A` comes from
    `behavior_items`.
    """
    from bahe_models import seeded

    encoder = Encoder(data, item_A, setting)
    train = Batches(encoder, data.splits["train"], rng=np.random.default_rng(seed))
    validation = Batches(encoder, data.splits["validation"])
    with TemporaryDirectory() as folder, seeded(seed):
        model = _build(
            network,
            encoder.feature_map(),
            setting,
            Path(folder),
            eval_steps=-(-len(train) // setting.evaluations),
        )
        model.fit(train, epochs=epochs, validation_data=validation)

    def score(split: Impressions) -> Scores:
        scores: Scores = model.predict(Batches(encoder, split))
        return scores

    return score


def _build(network: Network, feature_map: Any, setting: Setting, folder: Path, *, eval_steps: int) -> Any:
    # FuxiCTR puts its checkpoint into a folder of this name, which must exist.
    (folder / feature_map.dataset_id).mkdir()
    arguments = {
        "model_root": str(folder),
        "model_id": network,
        "gpu": -1,
        "verbose": 0,
        "metrics": ["AUC"],
        "optimizer": "adam",
        "loss": "binary_crossentropy",
        "eval_steps": eval_steps,
        "embedding_dim": setting.embedding_dim,
        "learning_rate": setting.learning_rate,
        "embedding_regularizer": setting.embedding_regularizer or None,
        "net_dropout": setting.net_dropout,
        "batch_norm": setting.batch_norm,
        **setting.network,
    }
    hidden = list(setting.hidden_units)
    if network == "DIN":
        from model_zoo.LongCTR.DIN.DIN import DIN

        return DIN(feature_map, dnn_hidden_units=hidden, **arguments)
    from model_zoo.LongCTR.DCNv2.DCNv2 import DCNv2

    return DCNv2(feature_map, parallel_dnn_hidden_units=hidden, **arguments)


def installed() -> bool:
    """Whether FuxiCTR is installed."""
    return all(importlib.util.find_spec(name) for name in ("fuxictr", "model_zoo"))


def turned(setting: Setting, knob: str, value: Any) -> Setting:
    """The setting with one knob at a value; `network.NAME` is an argument of one network alone."""
    if knob.startswith("network."):
        return replace(setting, network={**setting.network, knob.removeprefix("network."): value})
    return replace(setting, **{knob: value})


START: Mapping[Network, Setting] = {
    "DIN": Setting(network={"attention_hidden_units": [64], "din_use_softmax": False}),
    "DCNv2": Setting(network={"model_structure": "parallel", "num_cross_layers": 3}),
}
"""Where the search begins: FuxiCTR's own choices."""

_SHARED_KNOBS: list[tuple[str, list[Any]]] = [
    ("users", [False]),
    ("embedding_regularizer", [1e-5, 1e-4, 1e-3]),
    ("net_dropout", [0.2, 0.5]),
    ("learning_rate", [5e-4, 2e-3]),
    ("behavior", [("item",), ("item", "channel", "atom")]),
    ("evaluations", [3]),
    ("batch_size", [512, 4096]),
    ("embedding_dim", [32, 40]),
    ("hidden_units", [(128, 64), (64,)]),
    ("batch_norm", [True]),
]
KNOBS: Mapping[Network, list[tuple[str, list[Any]]]] = {
    "DIN": [
        *_SHARED_KNOBS,
        ("history", [20]),  # DIN does not run without any
        ("network.din_use_softmax", [True]),
        ("network.attention_hidden_units", [[32], [128, 64]]),
        ("network.dnn_activations", ["Dice"]),
    ],
    "DCNv2": [
        *_SHARED_KNOBS,
        ("history", [0, 20]),
        ("network.num_cross_layers", [1, 2]),
        ("network.model_structure", ["crossnet_only"]),
    ],
}
"""What the search varies, in this order, and the values that it tries besides the current one."""

TUNED: Mapping[Network, Setting] = {
    "DIN": replace(
        turned(START["DIN"], "network.dnn_activations", "Dice"),
        users=False,
        embedding_regularizer=1e-5,
        net_dropout=0.5,
    ),
    "DCNv2": replace(
        START["DCNv2"], users=False, learning_rate=2e-3, embedding_regularizer=1e-5, behavior=("item",)
    ),
}
"""Where the search ended; see docs/ml-engineers.md."""


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """The search: one knob after the other is left at the value with the highest validation AUC.

    `quick` trains only the setting that each search begins with and the one that it once ended with. The
    test split is not used.
    """
    from bahe_lake.connection import lake
    from bahe_models import auc
    from materialize.config.dataset import home_dataset
    from materialize.frames.frame import latest_frame
    from materialize.training.training_data import read_training_data
    from materialize.vectors.stored_atoms import current_encoder

    if not installed():
        raise NotReady(f"FuxiCTR is not installed; {INSTALL} adds it.")
    home = Home.at(home_path)
    with lake(home) as connection:
        encoder = current_encoder(connection, home)
        data = read_training_data(connection, latest_frame(home), encoder, home_dataset(home).channels)
        item_A = behavior_items(connection, data)
    validation = data.splits["validation"]

    def tried(network: Network, setting: Setting, name: str) -> Row:
        score = train_fuxi(network, data, item_A, setting, seed=0)
        validation_auc = auc(validation.clicked_N, score(validation))
        say(f"  {network}, {name}: {validation_auc:.4f}")
        return Row(metric=f"{network}, {name}", value=validation_auc, unit="validation AUC")

    for network, best in START.items():
        yield (row := tried(network, best, "start"))
        if quick:
            yield tried(network, TUNED[network], "tuned")
            continue
        for knob, values in KNOBS[network]:
            fixed, highest = best, row.value
            for value in values:
                setting = turned(fixed, knob, value)
                yield (other := tried(network, setting, f"{knob} {value}"))
                if other.value > highest:
                    best, highest, row = setting, other.value, other


if __name__ == "__main__":
    main("fuxi", __doc__ or "", measure)
