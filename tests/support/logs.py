"""A small log in which users like half of the items, as files with a dataset.yaml."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import yaml

WORDS = [f"word{i}" for i in range(60)]
LONG = "u" * 150
"""A user_id longer than what an answer repeats of one that it does not know."""


def small_log(seed: int = 0, users: int = 30, items: int = 25, rows: int = 900) -> dict[str, pd.DataFrame]:
    """Behaviors, impressions and items in which users like the items of one half of the words."""
    rng = np.random.default_rng(seed)
    text = {i: " ".join(rng.choice(WORDS[:30] if i % 2 else WORDS[30:], 4)) for i in range(items)}
    user, item = rng.integers(users, size=rows), rng.integers(items, size=rows)
    time = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(
        np.sort(rng.integers(0, 90 * 24 * 3600, rows)), unit="s"
    )
    like = rng.random(rows) < np.where(user % 2 == item % 2, 0.8, 0.25)
    return {
        "impressions": pd.DataFrame(
            {
                "impression_id": np.arange(rows),
                "user_id": [f"u{u}" for u in user],
                "item_id": item,
                "event_timestamp": time,
                "clicked": like.astype(int),
            }
        ),
        "behaviors": pd.DataFrame(
            {
                "user_id": [f"u{u}" for u in user],
                "channel": np.where(like, "liked", "disliked"),
                "text": [
                    f"{'liked' if ok else 'disliked'} {text[i]}" for ok, i in zip(like, item, strict=True)
                ],
                "event_timestamp": time,
                "item_id": item,
            }
        ),
        "items": pd.DataFrame(
            {
                "item_id": range(items),
                "text": [text[i] for i in range(items)],
                "event_timestamp": pd.Timestamp("2023-12-01", tz="UTC"),
            }
        ),
        # u_cold is known, and never did anything.
        "users": pd.DataFrame(
            {
                "user_id": [*(f"u{u}" for u in range(users)), "u_cold"],
                "event_timestamp": pd.Timestamp("2023-12-01", tz="UTC"),
            }
        ),
    }


def write_dataset(
    folder: Path, log: dict[str, pd.DataFrame], backbone: Path | None = None, **more: object
) -> Path:
    """The log as Parquet files with a dataset.yaml beside them; returns its path.

    Its freshness is live, so that few rows in a short time have features.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, object] = {"name": "small", "channels": ["liked", "disliked"]}
    for table, rows in log.items():
        rows.to_parquet(folder / f"{table}.parquet")
        sections[table] = {"files": f"{table}.parquet"}
    if backbone is not None:
        sections["backbone"] = {"path": str(backbone), "shallow_layers": 2, "deep_layers": 2}
    sections["freshness"] = "live"
    sections["model"] = {"deep_width": 8, "profile_width": 8, "head_width": 16}
    sections["training"] = {"epochs": 2, "impressions_per_step": 200}
    sections.update(more)
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path
