"""A training frame as a stream of tensors, for models of one's own.

    from torch.utils.data import DataLoader
    from materialize.frames.frame_dataset import FrameDataset

    train = FrameDataset(".bahe", ["user_click_rate", "item_click_rate", "clicked"], seed=0)
    for epoch in range(3):
        train.set_epoch(epoch)
        for batch in DataLoader(train, batch_size=None, num_workers=2):
            batch["user_click_rate"], batch["clicked"]  # [N] each

The frame is read by row groups and never as a whole. `DataLoader` workers and torchrun's ranks share its
rows: each row goes to exactly one of them, and all take the same number of batches, so that no rank waits
for another in vain.

Shape letters: N impressions of a batch, C channels, H behaviors of the history, L longest list, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from bahe_core.errors import BadInput, Damaged, one_line
from bahe_core.home import Home
from materialize.frames.arrow_to_numpy import Array, arrays_of, readable
from materialize.frames.frame import Frame, latest_frame
from materialize.frames.frame_history import FrameHistory, frame_history, write_vectors
from materialize.frames.frame_parts import (
    LEAST_PART,
    Part,
    rank_and_world_size,
    rows_between,
    split_counts,
)

ROW = "row"
"""The key of a batch under which each impression's row in the frame's file stands."""

SHUFFLED_ROWS = 131_072
"""Rows that are shuffled together; a reader holds about so many in memory."""


Batch = dict[str, Tensor]


class FrameDataset(IterableDataset[Batch]):
    """Batches of a frame's columns as tensors, each under its column's name, and `row`, the row's number in
    the file.

    - Integers, booleans and timestamps (microseconds) are int64; other numbers float32, NaN where null. A
      column of integers with nulls anywhere in the file is float64, NaN where null, which is exact to 2^53.
    - Text is its 64-bit hash, the same in every process and frame; take it modulo the rows of an embedding.
      Null is 0.
    - A list is padded with zeros to the longest of the batch, [N, L]; how long it was is in
      `<column>_length` [N]. Lists of equal length, such as vectors, come as they are.
    - With `history=H` the batch also has `history` [N, C, H]: atom rows of the last H behaviors before the
      impression in each channel of `channels`, oldest first, then zeros; `history_length` [N, C]; and
      `item`, the atom row of the item's text (-1 when unknown) [N]. `atom_ids` and `vectors` tell what an
      atom row stands for; a model that indexes `vectors` spares the workers from copying them.
    - With `vectors=True` the batch itself carries `history_vectors` [N, C, H, D] and `item_vectors` [N, D],
      zeros where there is none.

    Without `seed` rows come in the file's order, which is time's; with it they are shuffled, differently in
    each epoch (`set_epoch`), and in the same way whenever seed, epoch, workers and ranks are the same.
    """

    def __init__(
        self,
        frame: Frame | Home | Path | str,
        columns: Sequence[str],
        *,
        split: str | None = "train",
        batch_rows: int = 1024,
        seed: int | None = None,
        shuffled_rows: int = SHUFFLED_ROWS,
        history: int = 0,
        vectors: bool = False,
        rank: int | None = None,
        ranks: int | None = None,
    ) -> None:
        """`frame` is a frame, a home (its latest frame) or a Parquet file with the columns; `split` is one
        of the frame's, None for all rows; `rank` of `ranks` is torch.distributed's or torchrun's.

        Raises BadInput when the frame lacks a column or split, or an option is out of range; NotReady when
        the home has no frame, or no vectors.
        """
        for option, value, least in (
            ("batch_rows", batch_rows, 2),  # with 1, a reader with a row less would have a batch less
            ("shuffled_rows", shuffled_rows, 1),
            ("history", history, 0),
        ):
            if value < least:
                raise BadInput(f"{option} is {value}; it must be at least {least}.")
        self.path, home, made = _found(frame)
        self.columns = tuple(dict.fromkeys(columns))
        self.channels: tuple[str, ...] = ()
        """Of the C channels of a history, in their order."""
        self._batch_rows, self._seed, self._shuffled_rows = batch_rows, seed, shuffled_rows
        self._split = split
        self._count = history
        self._history: FrameHistory | None = None
        self._encoder: str | None = None
        self._home, self._frame = home, made
        if history or vectors:
            if home is None or made is None:
                raise BadInput(
                    f"{self.path} is not a frame of a home, so its timelines are not known; give the home."
                )
            self._history = frame_history(home, made)
            self.channels = self._history.channels
            if vectors:
                self._encoder = write_vectors(home, made, self._history)
        self._rank, self._ranks = rank_and_world_size(rank, ranks)
        with _opened(self.path) as file:
            schema = file.schema_arrow
            self._check_columns(schema)
            self._counts = split_counts(file, split)
            groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            self._first_rows = np.cumsum([0, *groups]).tolist()
            self._nullable = {c for c in self.columns if _has_nulls(file, c)}
        if not sum(self._counts):
            raise BadInput(f"{self.path} has no rows of the split {split}.")
        # In shared memory, so that workers that live on hear of it.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def rows(self) -> int:
        """Rows of the split, of all ranks together."""
        return sum(self._counts)

    @property
    def atom_ids(self) -> Tensor:
        """The id of each atom row [A]; needs `history`."""
        return torch.from_numpy(np.array(self._known_history().atom_ids))

    @property
    def vectors(self) -> Tensor:
        """The vector of each atom row [A, D], in memory; needs `history`. Raises NotReady without any."""
        known = self._known_history()
        assert self._home is not None
        assert self._frame is not None
        encoder = self._encoder or write_vectors(self._home, self._frame, known)
        return torch.from_numpy(np.array(known.vectors(encoder)))

    def set_epoch(self, epoch: int) -> None:
        """Shuffle in another way, also in workers that persist; before each pass, on every rank."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Batch]:
        """This worker's batches of this rank."""
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        readers, reader = self._ranks * workers, self._rank * workers + number
        if self.rows < readers:
            raise BadInput(
                f"{self.path}: {self.rows} rows cannot be shared by {readers} readers; use fewer workers."
            )
        start, stop = (self.rows * r // readers for r in (reader, reader + 1))
        # Readers differ by at most one row, and cut what they have into equally many batches.
        most = -(-self.rows // readers)
        batches = -(-most // self._batch_rows)
        sizes = np.diff([(stop - start) * b // batches for b in range(batches + 1)])
        order = rows = None
        if self._seed is not None:
            seeds = [self._seed, int(self._epoch)]
            order = np.random.default_rng(seeds)  # the same for every reader
            rows = np.random.default_rng([*seeds, readers, reader])
        yield from self._batches(rows_between(self._parts(order), start, stop), sizes, rows)

    def _parts(self, draw: np.random.Generator | None) -> list[Part]:
        """The split in pieces, of which several fill a shuffled block."""
        most = max(LEAST_PART, self._shuffled_rows // 8)
        parts = [
            Part(group, start, min(start + most, count))
            for group, count in enumerate(self._counts)
            for start in range(0, count, most)
        ]
        return parts if draw is None else [parts[i] for i in draw.permutation(len(parts))]

    def _batches(
        self, parts: list[Part], sizes: Array, draw: np.random.Generator | None
    ) -> Iterator[Batch]:
        with _opened(self.path) as file:
            blocks = self._blocks(file, parts, draw)
            left = next(blocks)
            for size in sizes.tolist():
                while left.num_rows < size:
                    left = pa.concat_tables([left, next(blocks)])
                yield self._tensors(left.slice(0, size))
                left = left.slice(size)

    def _blocks(
        self, file: pq.ParquetFile, parts: list[Part], draw: np.random.Generator | None
    ) -> Iterator[pa.Table]:
        """The parts' rows with their numbers, about `shuffled_rows` at a time, shuffled if wanted."""
        held: list[pa.Table] = []
        for i, part in enumerate(parts):
            held.append(self._read(file, part))
            last = i == len(parts) - 1
            if last or draw is None or sum(t.num_rows for t in held) >= self._shuffled_rows:
                block = pa.concat_tables(held).combine_chunks()
                held = []
                yield block if draw is None else block.take(draw.permutation(block.num_rows))

    def _read(self, file: pq.ParquetFile, part: Part) -> pa.Table:
        lengths = [f"length_{c}" for c in self.channels] if self._count else []
        wanted = {*self.columns, *lengths, *(["split"] if self._split is not None else [])}
        table = file.read_row_group(part.group, sorted(wanted), use_threads=False)
        first = self._first_rows[part.group]
        table = table.append_column(ROW, pa.array(np.arange(first, first + table.num_rows)))
        if self._split is not None:
            table = table.filter(pc.equal(table["split"], self._split)).drop_columns(["split"])
        # A copy, since a slice would keep the whole row group in memory.
        return table.take(np.arange(part.start, part.stop))

    def _tensors(self, table: pa.Table) -> Batch:
        rows = table[ROW].to_numpy()
        batch: Batch = {ROW: _tensor(rows)}
        for column in self.columns:
            values = table[column].combine_chunks()
            batch |= {
                name: _tensor(found)
                for name, found in arrays_of(column, values, column in self._nullable).items()
            }
        if self._history is not None:
            batch |= self._history_tensors(self._history, table, rows)
        return batch

    def _history_tensors(self, known: FrameHistory, table: pa.Table, rows: Array) -> Batch:
        item_N = known.item_rows(rows)
        found: dict[str, Array] = {"item": item_N}
        if self._count:
            lengths = [table[f"length_{c}"].fill_null(0).to_numpy() for c in self.channels]
            atoms_NCH, held_NC = known.last(rows, np.stack(lengths, axis=1), self._count)
            found |= {"history": atoms_NCH, "history_length": held_NC}
        if self._encoder is not None:
            vectors = known.vectors(self._encoder)
            found["item_vectors"] = np.where(item_N[:, None] >= 0, vectors[item_N], np.float32(0))
            if self._count:
                vectors_NCHD = vectors[atoms_NCH]
                vectors_NCHD[np.arange(self._count) >= held_NC[..., None]] = 0
                found["history_vectors"] = vectors_NCHD
        return {name: _tensor(values) for name, values in found.items()}

    def _known_history(self) -> FrameHistory:
        if self._history is None:
            raise BadInput("this dataset was made without history; give `history` or `vectors`.")
        return self._history

    def _check_columns(self, schema: pa.Schema) -> None:
        lengths = [f"length_{c}" for c in self.channels] if self._count else []
        for column in [*self.columns, *lengths, *(["split"] if self._split is not None else [])]:
            if column not in schema.names:
                raise BadInput(f"{self.path} has no column {column}; it has {', '.join(schema.names)}.")
        for column in self.columns:
            if not readable(schema.field(column).type):
                raise BadInput(
                    f"{self.path}: column {column} is {schema.field(column).type}, which is no tensor."
                )
        if ROW in self.columns:
            raise BadInput(f"{self.path}: rename column {ROW}; batches have their row numbers there.")


def _tensor(values: Array) -> Tensor:
    """Of memory of its own where Arrow's may not be written to."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))


def _found(frame: Frame | Home | Path | str) -> tuple[Path, Home | None, Frame | None]:
    """The file, and the home and frame that it belongs to, if to any."""
    if isinstance(frame, Path | str):
        path = Path(frame).expanduser().resolve()
        if path.is_file():
            frame = Frame(path, path.parent.name, {}, skipped=True)
        elif path.suffix == ".parquet":
            raise BadInput(f"{path} is not there; give a frame's Parquet file, or a home.")
        else:
            frame = Home.at(path)
    if isinstance(frame, Home):
        return (found := latest_frame(frame)).path, frame, found
    path = frame.path
    home = Home(path.parents[2]) if len(path.parents) > 2 else None
    if home is None or path.parent.parent != home.frames or not (home.root / "dataset.yaml").is_file():
        return path, None, None
    return path, home, frame


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Raises Damaged when the file is no whole Parquet file."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"{path} cannot be read ({one_line(error)}); pull the frame again.") from None


def _has_nulls(file: pq.ParquetFile, column: str) -> bool:
    """Whether a plain column may hold a null; a nested one has rules of its own."""
    metadata = file.metadata
    for group in range(file.num_row_groups):
        parts = (metadata.row_group(group).column(i) for i in range(metadata.num_columns))
        for part in parts:
            if part.path_in_schema == column and (
                part.statistics is None or part.statistics.null_count is None or part.statistics.null_count
            ):
                return True
    return False
