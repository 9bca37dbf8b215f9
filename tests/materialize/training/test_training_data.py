"""What the trainer reads of a log in which an item changes its text."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

import bahe
from bahe_lake.connection import lake
from materialize.frames.frame_dataset import FrameDataset
from materialize.training.training_data import read_training_data
from materialize.vectors.stored_atoms import current_encoder
from tests.support.logs import small_log, write_dataset


def test_an_impression_has_the_text_of_its_moment(tmp_path: Path, tiny_backbone: Path) -> None:
    log = small_log(rows=300, items=8)
    renamed = pd.Timestamp("2024-02-10", tz="UTC")
    after = log["items"].loc[[3]].assign(text="word1 word2", event_timestamp=renamed)
    log["items"] = pd.concat([log["items"], after], ignore_index=True)
    project = bahe.open(tmp_path / "home")
    project.ingest(write_dataset(tmp_path / "log", log, tiny_backbone))
    project.encode()
    project.apply()
    frame, home = project.frame(), project.home
    with lake(home) as connection:
        texts = dict(connection.execute("SELECT atom_id, text FROM atoms").fetchall())
        data = read_training_data(
            connection, frame, current_encoder(connection, home), ["liked", "disliked"]
        )
    assert len(data.item_ids) == 9
    assert data.item_ids.count(3) == 2
    seen = set()
    for split in data.splits.values():
        for row, time_us in zip(split.item_N.tolist(), split.time_us_N.tolist(), strict=True):
            text = texts[int(data.atom_ids[data.item_atom_I[row]])]
            if data.item_ids[row] == 3:
                assert (text == "word1 word2") == (pd.Timestamp(time_us * 1000, tz="UTC") > renamed)
                seen.add(text)
    assert len(seen) == 2
    rows = FrameDataset(home, ["impression_id"], split=None, vectors=True)
    shown = log["impressions"].set_index("impression_id")
    for batch in rows:
        for impression, atom in zip(batch["impression_id"].tolist(), batch["item"].tolist(), strict=True):
            one = shown.loc[impression]
            if one["item_id"] == 3:
                text = texts[int(data.atom_ids[atom])]
                assert (text == "word1 word2") == (one["event_timestamp"] > renamed)
