"""What encoding costs: against sentence-transformers, the matrix-multiply bound, and a log that grows.

Both contenders run the same shallow layers in the same precision on the same texts, from text to vectors,
one after the other, several times; the peer with several batch sizes and implementations of attention, of
which the fastest counts. Its texts get the start token that bahe puts in front, so that both read the same
tokens.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from bahe_core.errors import NotReady
from bahe_core.home import Home
from benchmarks.ablation import DEFAULT, Encodings, Scene, Variant, read_scene, validation_auc
from benchmarks.harness import Row, main
from benchmarks.matmul import matmul_rate

if TYPE_CHECKING:
    import torch

    from bahe_models import AtomicEncoder, Backbone

PEER_BATCH_SIZES = (16, 32, 64, 128)
PEER_ATTENTION = ("sdpa", "eager")
NEW_SHARE = 0.01


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Every figure; `quick` takes fewer texts, repetitions, peers' settings, epochs and seeds."""
    scene = read_scene(Home.at(home_path))
    yield from speed(scene, texts=600 if quick else 2000, repetitions=3 if quick else 5, quick=quick)
    yield deduplication(home_path, scene)
    with copied(home_path) as home:
        yield from growth(home)
        yield from disk(home, scene)
    yield from accuracy(scene, quick)


def speed(scene: Scene, *, texts: int, repetitions: int, quick: bool) -> Iterable[Row]:
    """Tokens a second of both contenders, and how close ours is to its matrix products alone."""
    import torch

    from bahe_models import AtomicEncoder, load_backbone

    halves = load_backbone(scene.backbone)
    encoder = AtomicEncoder(halves, scene.encoder, device=torch.device("cpu"))
    dtype = torch.bfloat16 if encoder.bfloat16 else torch.float32
    chosen = np.random.default_rng(0).choice(len(scene.texts), min(texts, len(scene.texts)), replace=False)
    channels = [scene.channels[i] for i in chosen]
    sample = [scene.texts[i] for i in chosen]
    tokens = encoder.tokenize(channels, sample)
    count = sum(map(len, tokens))
    shapes = [
        (module.in_features, module.out_features)
        for module in halves.shallow.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    flops = 2 * count * sum(i * o for i, o in shapes)
    compiled = AtomicEncoder(halves, replace(scene.encoder, compile=True), device=torch.device("cpu"))
    ours: list[float] = []
    ours_compiled: list[float] = []
    bounds: list[float] = []
    peers: dict[str, list[float]] = {}
    with peer_encoders(halves, encoder, dtype) as models:
        start_token = str(halves.tokenizer.decode([tokens[0][0]]))
        template = scene.encoder.template
        filled = [
            start_token + template.format(channel=c, text=t) for c, t in zip(channels, sample, strict=True)
        ]
        peer_tokens = models[PEER_ATTENTION[0]].preprocess(filled[:50])["attention_mask"].sum().item()
        assert peer_tokens == sum(map(len, tokens[:50])), "the peer does not read the same tokens"
        sizes = PEER_BATCH_SIZES[1:3] if quick else PEER_BATCH_SIZES
        settings: dict[str, Callable[[], object]] = {
            f"{attention}, batches of {size}": lambda model=models[attention], size=size: model.encode(  # type: ignore[misc]
                filled, batch_size=size, show_progress_bar=False
            )
            for attention, size in product(PEER_ATTENTION, sizes)
        }
        for repetition in range(repetitions + 1):
            # The first round allocates and is not counted.
            bound = flops / matmul_rate(shapes, encoder.tokens_per_batch, dtype, backward=False)
            own = seconds(lambda: encoder.encode(channels, sample))
            own_compiled = seconds(lambda: compiled.encode(channels, sample))
            theirs = {name: seconds(run) for name, run in settings.items()}
            if repetition:
                bounds.append(bound)
                ours.append(own)
                ours_compiled.append(own_compiled)
                for name, taken in theirs.items():
                    peers.setdefault(name, []).append(taken)
    best = min(peers, key=lambda name: median(peers[name]))
    ratio = median(theirs / own for theirs, own in zip(peers[best], ours, strict=True))
    precision = str(dtype).removeprefix("torch.")
    yield Row(
        metric=f"encoder, {len(sample):,} unique texts, {precision}",
        value=count / median(ours),
        unit="tokens/s",
        peer=f"sentence-transformers, {best}",
        peer_value=count / median(peers[best]),
    )
    yield Row(
        metric="times as fast as sentence-transformers",
        value=ratio,
        unit="x, median of paired runs",
        goal=">= 1.3",
        holds=ratio >= 1.3,
    )
    for how, spent in (("", ours), (", --compile", ours_compiled)):
        reached = median(bound / own for bound, own in zip(bounds, spent, strict=True))
        yield Row(
            metric=f"share of encoding that is matrix products{how}",
            value=reached,
            unit=f"of 1, bound at {precision} speed in the same run",
            goal=None if how else ">= 0.7",
            holds=None if how else reached >= 0.7,
        )
    yield Row(
        metric="times as fast with --compile",
        value=median(own / other for own, other in zip(ours, ours_compiled, strict=True)),
        unit="x, once compiled",
    )
    padded_tokens = sum(len(rows) * max(len(tokens[i]) for i in rows) for rows in encoder.batches(tokens))
    yield Row(metric="padding", value=100 * (1 - count / padded_tokens), unit="% of the model's work")


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextlib.contextmanager
def peer_encoders(halves: Backbone, encoder: AtomicEncoder, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """sentence-transformers' model of the same layers, for each implementation of attention."""
    from safetensors.torch import save_file

    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import modules
    except ImportError:
        raise NotReady("the peer is not installed; pip install 'bahe[bench]'.") from None
    import torch
    from transformers.utils import logging

    with tempfile.TemporaryDirectory() as folder:
        hf_half: Any = halves.shallow
        config = copy.deepcopy(hf_half.config)
        config.__dict__.pop("quantization_config", None)  # from a GGUF file; the weights are floats by now
        config.save_pretrained(folder)
        state = {name: weight.contiguous() for name, weight in halves.shallow.state_dict().items()}
        save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})
        tokenizer = copy.deepcopy(halves.tokenizer)
        tokenizer.chat_template = None  # with it the peer would format texts as conversations
        tokenizer.save_pretrained(folder)
        models = {}
        logging.set_verbosity_error()
        for attention in PEER_ATTENTION:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                transformer = modules.Transformer(
                    folder,
                    model_kwargs={"dtype": dtype, "attn_implementation": attention},
                    max_seq_length=encoder.config.max_tokens + 1,
                )
            transformer.auto_model.norm = torch.nn.Identity()  # belongs after the whole model's last layer
            pooling = modules.Pooling(encoder.width, "mean")
            models[attention] = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        logging.set_verbosity_warning()
        yield models


def deduplication(home_path: Path, scene: Scene) -> Row:
    """Tokens of the raw log, against those of its distinct atoms."""
    from bahe_lake.connection import lake
    from bahe_models import AtomicEncoder, load_backbone

    encoder = AtomicEncoder(load_backbone(scene.backbone), scene.encoder)
    lengths = np.array([len(row) for row in encoder.tokenize(scene.channels, scene.texts)])
    with lake(Home.at(home_path)) as connection:
        counted = dict(
            connection.execute(
                "SELECT atom_id, count(*) FROM (SELECT atom_id FROM behaviors UNION ALL"
                " SELECT atom_id FROM items) GROUP BY atom_id"
            ).fetchall()
        )
    times = np.array([counted.get(atom_id, 0) for atom_id in scene.data.atom_ids.tolist()])
    return Row(
        metric="tokens of the raw log to tokens of distinct atoms",
        value=float((times * lengths).sum() / lengths.sum()),
        unit=f"x, {times.sum():,} behaviors and items, {len(times):,} atoms",
    )


@contextlib.contextmanager
def copied(home_path: Path) -> Iterator[Home]:
    """A copy of the home that may be changed."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "home"
        shutil.copytree(home_path, root, ignore=shutil.ignore_patterns("mlflow", ".lock"))
        yield Home.at(root)


def growth(home: Home) -> Iterable[Row]:
    """A full run, one with a hundredth of the atoms new, and runs with nothing new to do."""
    from bahe_lake.connection import lake
    from bahe_lake.transactions import commit
    from materialize.gate import gate
    from materialize.vectors.embed import embed
    from materialize.vectors.encode import TABLE, encode

    with lake(home) as connection:
        commit(connection, [f"DELETE FROM {TABLE}"])
    full = encode(home)
    with lake(home) as connection:
        new = max(1, round(full.total * NEW_SHARE))
        # A random hundredth, by a hash of the text.
        commit(
            connection,
            [
                f"DELETE FROM {TABLE} WHERE atom_id IN"
                f" (SELECT atom_id FROM atoms ORDER BY hash(text) LIMIT {new})"
            ],
        )
    partial = encode(home)
    assert partial.added == new
    share = partial.model_seconds / full.model_seconds
    yield Row(
        metric=f"model time with {new:,} of {full.total:,} atoms new",
        value=100 * share,
        unit="% of the full run's",
        peer="full run, s",
        peer_value=full.model_seconds,
        goal="<= 2",
        holds=share <= 0.02,
    )
    yield Row(metric="padding of the full run", value=100 * full.padding, unit="% of the model's work")
    gate(home, "encode")
    jobs: dict[str, Callable[[], object]] = {
        "encode": lambda: encode(home),
        "embed": lambda: embed(home),
    }
    for job, run in jobs.items():
        run()
        if job == "embed":
            gate(home, job)
        taken = seconds(run)
        yield Row(metric=f"{job} with nothing new", value=taken, unit="s", goal="< 5", holds=taken < 5)


def disk(home: Home, scene: Scene) -> Iterable[Row]:
    """Bytes of the vectors' files, as encode writes them, in both storages."""
    import pyarrow as pa

    from bahe_lake.connection import lake
    from bahe_lake.transactions import commit
    from materialize.vectors.chunks import Encodings as Chunk
    from materialize.vectors.encode import TABLE, _store

    sizes = {}
    for storage, vectors in (("float32", scene.data.atoms_AD), ("float16", half(scene.data.atoms_AD))):
        with lake(home) as connection:
            commit(connection, [f"DELETE FROM {TABLE}"])
            atom_ids = pa.array(scene.data.atom_ids)
            times = pa.array(np.zeros(len(atom_ids), dtype="datetime64[us]"), pa.timestamp("us", "UTC"))
            _store(connection, [Chunk(atom_ids, times, vectors, 0, 0, 0.0)], storage)
            listed = connection.execute(
                f"SELECT sum(data_file_size_bytes) FROM ducklake_list_files('lake', '{TABLE}')"
            ).fetchone()
        assert listed is not None
        sizes[storage] = float(listed[0])
    yield Row(
        metric="disk of vectors in float16",
        value=sizes["float16"] / scene.data.atoms_AD.size,
        unit="bytes a number",
        peer="float32",
        peer_value=sizes["float32"] / scene.data.atoms_AD.size,
    )


def half(vectors: np.ndarray) -> np.ndarray:
    """The vectors rounded as with `encoder.storage: float16`."""
    return vectors.astype(np.float16).astype(np.float32)


def accuracy(scene: Scene, quick: bool) -> Iterable[Row]:
    """Validation AUC of models trained on rounded vectors, and on vectors computed in float32."""
    from bahe_models import AtomicEncoder, load_backbone

    training = {"epochs": 1} if quick else {}
    variants = {
        "as encoded here": Variant(name=DEFAULT, training=training),
        "rounded to float16": Variant(
            name="float16", training=training, data=lambda d: replace(d, atoms_AD=half(d.atoms_AD))
        ),
    }
    if not quick:
        exact = AtomicEncoder(load_backbone(scene.backbone), scene.encoder, bfloat16=False)
        vectors = exact.encode(scene.channels, scene.texts)
        distance = np.linalg.norm(scene.data.atoms_AD - vectors, axis=1) / np.linalg.norm(vectors, axis=1)
        yield Row(metric="distance of vectors to float32's", value=100 * float(distance.mean()), unit="%")
        variants["computed in float32"] = Variant(
            name="float32", data=lambda d: replace(d, atoms_AD=vectors)
        )
    encodings = Encodings(scene)
    aucs = {
        name: [validation_auc(scene, encodings, variant, seed) for seed in range(1 if quick else 3)]
        for name, variant in variants.items()
    }
    default = aucs.pop("as encoded here")
    spread = f"seeds of those {min(default):.4f} to {max(default):.4f}"
    for name, values in aucs.items():
        yield Row(
            metric=f"validation AUC of atoms {name}",
            value=mean(values),
            unit="one seed, one epoch" if quick else f"mean of 3 seeds; {spread}",
            peer="as encoded here",
            peer_value=mean(default),
        )


if __name__ == "__main__":
    main("encode", __doc__ or "", measure)
