"""One training step of BAHE and of the long-text LLM on the demo's home, as the benchmarks time them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bahe_core.home import Home

if TYPE_CHECKING:
    import torch

    from bahe_models import Backbone, Batches, DenseFeatures, Impressions, TrainingData
    from bahe_models.baselines import LongText, TokenTimelines
    from materialize.training.train_with_baselines import Settings


Int64 = npt.NDArray[np.int64]


Step = Callable[[Int64], "torch.Tensor"]
"""Rows of the training split to their click logits."""


PROMPT_TOKENS = (512, 1024, 2048)
LONGEST = max(PROMPT_TOKENS)


@dataclass(frozen=True)
class Scene:
    """What every contender reads."""

    data: TrainingData
    settings: Settings
    halves: Backbone
    dense: DenseFeatures
    tokens: TokenTimelines
    item_row_I: Int64

    @property
    def split(self) -> Impressions:
        """The training impressions."""
        return self.data.splits["train"]

    def long_histories(self) -> Int64:
        """Impressions whose history fills the longest prompt."""
        split, tokens = self.split, self.tokens
        first_N = tokens.offsets[split.user_N]
        end_N = first_N + split.length_NC.sum(axis=1)
        return np.flatnonzero(tokens.starts[end_N] - tokens.starts[first_N] >= LONGEST)


def read_scene(home: Home) -> Scene:
    """Training data, language model and token timelines of a home filled by `bahe demo`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from bahe_lake.connection import lake
    from bahe_models import fit_dense, item_id_rows, load_backbone
    from bahe_models.baselines import token_timelines
    from materialize.config.backbone import encoder_settings
    from materialize.config.dataset import home_dataset
    from materialize.frames.frame import latest_frame
    from materialize.training.train_with_baselines import Settings
    from materialize.training.training_data import read_training_data
    from materialize.vectors.stored_atoms import current_encoder

    dataset = home_dataset(home)
    frame = latest_frame(home)
    backbone, encoder = encoder_settings(dataset)
    halves = load_backbone(backbone)
    with lake(home) as connection:
        data = read_training_data(connection, frame, current_encoder(connection, home), dataset.channels)
        # Users are numbered as read_training_data does: by first appearance in the frame.
        users = pq.read_table(frame.path)["user_id"].combine_chunks().dictionary_encode().dictionary
        connection.register("frame_users", pa.table({"user_id": users, "u": np.arange(len(users))}))
        behaviors = connection.execute(
            "SELECT u, a.text, t.atom_id FROM user_timeline t JOIN frame_users USING (user_id)"
            " JOIN atoms a USING (atom_id) ORDER BY u, t.event_timestamp, t.channel, t.position"
        ).to_arrow_table()
    user_B = behaviors["u"].to_numpy()
    _, first_A, atom_B = np.unique(behaviors["atom_id"].to_numpy(), return_index=True, return_inverse=True)
    counts = np.bincount(user_B, minlength=data.timelines.users)
    assert (counts == data.timelines.lengths().sum(axis=1)).all(), "texts and timelines differ"
    tokens = token_timelines(
        halves.tokenizer,
        behaviors["text"].take(first_A).to_pylist(),
        atom_B,
        np.concatenate([[0], np.cumsum(counts)]),
        encoder.max_tokens,
    )
    item_row_I = item_id_rows(data.splits["train"].item_N, data.item_ids)
    return Scene(data, Settings.of(dataset), halves, fit_dense(data), tokens, item_row_I)


def fresh_deep(scene: Scene) -> torch.nn.Module:
    """A copy of the deep layers as loaded: each contender trains its own."""
    return copy.deepcopy(scene.halves.deep)


def bahe_batches(scene: Scene, **changes: Any) -> Batches:
    """BAHE, ready to train; `changes` override its ModelConfig."""
    import torch

    from bahe_models import Batches, build_model
    from bahe_models.trainer.ctr_training import precision

    settings, cpu = scene.settings, torch.device("cpu")
    config = replace(settings.model, **changes)
    model = build_model(fresh_deep(scene), scene.data, scene.dense, config, scene.item_row_I)
    return Batches(
        model.train(),
        scene.data,
        scene.dense,
        settings.window,
        item_row_I=scene.item_row_I,
        device=cpu,
        bfloat16=precision(settings.training, cpu),
    )


def long_text(scene: Scene, attention: str) -> LongText:
    """The peer with the same deep layers and head; `attention` is transformers' name of a kernel."""
    from bahe_models import build_model
    from bahe_models.baselines import LongText

    # A prompt is one sequence, whatever channels its behaviors are of.
    merged = replace(scene.settings.model, channels="merged")
    head = build_model(fresh_deep(scene), scene.data, scene.dense, merged, scene.item_row_I)
    shallow = copy.deepcopy(scene.halves.shallow)
    shallow.set_attn_implementation(attention)  # type: ignore[operator]
    head.aggregator.deep.set_attn_implementation(attention)  # type: ignore[operator, union-attr]
    return LongText(shallow, head).train()


def bahe_step(batches: Batches, *, share: bool) -> Step:
    """Logits by one pass per user, or per impression."""
    split = batches.data.splits["train"]
    dense_NF = batches.dense_features(split)
    return lambda rows: batches.logits(split, dense_NF, rows, share=share)


def long_text_step(
    model: LongText, scene: Scene, max_tokens: int, *, packed: bool, split_name: str = "train"
) -> Step:
    """Logits by text prompts, in the same precision as BAHE."""
    import torch

    from bahe_models.trainer.ctr_training import precision

    split, data = scene.data.splits[split_name], scene.data
    dense_NF = torch.from_numpy(scene.dense.transform(split.columns, split.length_NC, split.time_us_N))
    atoms_AD = torch.from_numpy(data.atoms_AD)
    bfloat16 = precision(scene.settings.training, torch.device("cpu"))

    def logits(rows: Int64) -> torch.Tensor:
        length_N = split.length_NC[rows].sum(axis=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            user_NV = model.user_vectors(
                scene.tokens, split.user_N[rows], length_N, max_tokens, packed=packed
            )
        item_N = split.item_N[rows]
        item_NV = model.head.item_vectors(
            atoms_AD[data.item_atom_I[item_N]], torch.from_numpy(scene.item_row_I[item_N])
        )
        return model.head.score(user_NV.float(), item_NV, dense_NF[torch.from_numpy(rows)])

    return logits


def stepper(step: Step, model: torch.nn.Module, scene: Scene) -> Callable[[Int64], float]:
    """A function that trains one step on some impressions and returns its seconds."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    clicked_N = torch.from_numpy(scene.split.clicked_N)

    def run(rows: Int64) -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            step(rows), clicked_N[torch.from_numpy(rows)]
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return time.perf_counter() - start

    return run


def planned(
    scene: Scene, among: Int64, impressions_per_step: int, *, split_name: str = "train"
) -> list[Int64]:
    """Steps as the trainer plans them: whole users, users of similar length together."""
    from bahe_models.timelines import plan_steps

    split, rng = scene.data.splits[split_name], np.random.default_rng(0)
    steps = plan_steps(
        split.user_N[among],
        split.length_NC[among],
        impressions_per_step=impressions_per_step,
        rng=rng,
        merged=scene.settings.model.merged,
    )
    return [among[rows] for rows in steps]
