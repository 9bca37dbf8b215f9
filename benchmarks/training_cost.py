"""What a training step costs, BAHE against the long-text LLM that it replaces.

All contenders train the same deep layers on the same impressions of the same users: those whose history
fills the longest prompt, so that no prompt is short. The peer is measured with several impressions per step
and two implementations of attention, and its fastest counts. A step is forward, backward and
optimiser.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from bahe_core.home import Home
from bahe_core.machine import PeakMemory, configure_threads
from benchmarks.harness import Row, main
from benchmarks.matmul import matmul_rate
from benchmarks.training_steps import (
    LONGEST,
    PROMPT_TOKENS,
    Int64,
    Scene,
    Step,
    bahe_batches,
    bahe_step,
    long_text,
    long_text_step,
    planned,
    read_scene,
    stepper,
)

if TYPE_CHECKING:
    import torch

    from bahe_models import Batches


PEER_IMPRESSIONS_PER_STEP = (1, 4)
PEER_ATTENTION = ("sdpa", "eager")
"""Torch's fused kernel, and plain products, which BAHE's short windows take on a CPU."""
MEMORY_IMPRESSIONS = 8
HISTORY_LENGTHS = (10, 30, 100, 300, 1000)
POSITIONS_PER_STEP = 4000
EPOCH_IMPRESSIONS = 80_000


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Every figure; `quick` takes fewer prompt lengths, repetitions and steps."""
    import torch

    scene = read_scene(Home.at(home_path))
    torch.manual_seed(0)
    batches = bahe_batches(scene)
    one_pass = stepper(bahe_step(batches, share=True), batches.model, scene)
    yield from step_times(scene, batches, one_pass, quick)
    yield from peak_memory(home_path)
    yield slope(scene, 2 if quick else 5)
    yield from epoch(scene, one_pass, 0.1 if quick else 0.5)


def step_times(
    scene: Scene, batches: Batches, one_pass: Callable[[Int64], float], quick: bool
) -> Iterable[Row]:
    """Seconds per impression of every contender, interleaved, on the same kind of impressions."""
    prompts = (PROMPT_TOKENS[0], LONGEST) if quick else PROMPT_TOKENS
    among = scene.long_histories()
    rng = np.random.default_rng(0)
    models = {attention: long_text(scene, attention) for attention in PEER_ATTENTION}
    whole_users = planned(scene, among, scene.settings.training.impressions_per_step)
    # A packed step holds fewer users than BAHE's: its activations are those of every token.
    few_users = [rows for rows in planned(scene, among, 200) if len(rows) >= 100]

    def random_step(steps: list[Int64]) -> Int64:
        return steps[rng.integers(len(steps))]

    # By name, tokens and, for the peer, attention and impressions per step.
    contenders: dict[tuple[str, int, str], tuple[Callable[[Int64], float], Callable[[], Int64]]] = {
        ("one pass", 0, ""): (one_pass, lambda: random_step(whole_users)),
        ("per impression", 0, ""): (
            stepper(bahe_step(batches, share=False), batches.model, scene),
            lambda: rng.choice(among, 32, replace=False),
        ),
    }
    for tokens, (attention, model) in product(prompts, models.items()):
        single = stepper(long_text_step(model, scene, tokens, packed=False), model, scene)
        packed = stepper(long_text_step(model, scene, tokens, packed=True), model, scene)
        contenders["packed", tokens, attention] = (packed, lambda: random_step(few_users))
        for count in PEER_IMPRESSIONS_PER_STEP:
            contenders["text", tokens, f"{attention}, {count}"] = (
                single,
                lambda count=count: rng.choice(among, count, replace=False),  # type: ignore[misc]
            )
        single(among[:1])
    one_pass(random_step(whole_users))  # a first step also allocates and compiles kernels
    taken: dict[tuple[str, int, str], list[float]] = {name: [] for name in contenders}
    for _ in range(2 if quick else 7):
        for name, (step, rows_of) in contenders.items():
            # Cheap contenders are noisier, and repeating them costs little.
            for _ in range(5 if name[0] == "one pass" else 1):
                rows = rows_of()
                taken[name].append(step(rows) / len(rows))
    milliseconds = {name: median(seconds) * 1e3 for name, seconds in taken.items()}
    ours = milliseconds["one pass", 0, ""]

    def fastest(peer: str, tokens: int) -> float:
        return min(value for (*name, _), value in milliseconds.items() if name == [peer, tokens])

    unit = "ms / impression"
    yield Row(
        metric="training step, one pass per user",
        value=ours,
        unit=unit,
        peer="BAHE per impression",
        peer_value=milliseconds["per impression", 0, ""],
    )
    for tokens in prompts:
        for peer, theirs, least in (
            ("long text per impression", fastest("text", tokens), 4000),
            ("long text packed", fastest("packed", tokens), 40),
        ):
            goal = tokens == LONGEST
            yield Row(
                metric=f"times cheaper than {peer}, {tokens} tokens",
                value=theirs / ours,
                unit="x",
                peer=f"{peer}, {unit}",
                peer_value=theirs,
                goal=f">= {least}" if goal else None,
                holds=theirs / ours >= least if goal else None,
            )


def peak_memory(home_path: Path) -> Iterable[Row]:
    """Resident memory that a step adds, each contender in a process of its own."""
    context = multiprocessing.get_context("spawn")
    added = {}
    for kind in ("bahe", "recompute", "packed", "text"):
        with context.Pool(1) as pool:
            added[kind] = pool.apply(memory_of_step, (kind, home_path))
    for ours, how in (("bahe", ""), ("recompute", ", training.recompute")):
        for kind, name in (("text", "long text per impression"), ("packed", "long text packed")):
            ratio = added[kind] / added[ours]
            yield Row(
                metric=f"memory of a step, times less than {name}{how}",
                value=ratio,
                unit=f"x at {MEMORY_IMPRESSIONS} impressions, {LONGEST} tokens",
                peer=f"MiB of BAHE {added[ours]:.0f}, of peer",
                peer_value=added[kind],
                goal=">= 6" if kind == "text" else None,
                holds=ratio >= 6 if kind == "text" else None,
            )


def memory_of_step(kind: str, home_path: Path) -> float:
    """MiB that a step on impressions of several users adds at its peak, optimiser state included."""
    from bahe_models.backbone import recompute_activations

    configure_threads()
    scene = read_scene(Home.at(home_path))
    step: Step
    model: torch.nn.Module
    if kind in ("bahe", "recompute"):
        batches = bahe_batches(scene)
        if kind == "recompute":
            deep = batches.model.aggregator.deep
            assert deep is not None
            recompute_activations(deep, True)
        step, model = bahe_step(batches, share=True), batches.model
    else:
        text = long_text(scene, "sdpa")  # the one that needs less memory
        step, model = long_text_step(text, scene, LONGEST, packed=kind == "packed"), text
    among = scene.long_histories()
    rows = np.random.default_rng(0).choice(among, MEMORY_IMPRESSIONS, replace=False)
    run = stepper(step, model, scene)
    gc.collect()
    with contextlib.suppress(OSError):  # memory that the allocator kept would hide the step's
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = PeakMemory()
    with before:
        pass
    run(rows[:1])  # afterwards the optimiser has its state, as in every step but the first
    with PeakMemory(interval=0.002) as peak:
        run(rows)
    return peak.mebibytes - before.mebibytes


def slope(scene: Scene, repetitions: int) -> Row:
    """How one pass per user grows with the history: log-log slope of seconds per user."""
    from bahe_models import Timelines

    rng = np.random.default_rng(0)
    channels = scene.data.timelines.channels
    runs: list[tuple[Callable[[Int64], float], int]] = []
    for length in HISTORY_LENGTHS:
        users = max(2, POSITIONS_PER_STEP // length)
        no_behaviors = np.zeros(users + 1, dtype=np.int64)
        offsets = (np.arange(users + 1) * length, *(no_behaviors for _ in channels[1:]))
        atoms = (
            rng.integers(len(scene.data.atoms_AD), size=users * length),
            *(no_behaviors[:0],) * (len(channels) - 1),
        )
        # One impression after every behavior, as in a log where each impression becomes a behavior.
        count = users * length
        rows = np.arange(count) % len(scene.split)
        length_NC = np.zeros((count, len(channels)), dtype=np.int64)
        length_NC[:, 0] = np.tile(np.arange(1, length + 1), users)
        split = scene.split
        synthetic = replace(
            split,
            user_N=np.repeat(np.arange(users), length),
            item_N=split.item_N[rows],
            length_NC=length_NC,
            time_us_N=split.time_us_N[rows],
            clicked_N=split.clicked_N[rows],
            columns={name: values[rows] for name, values in split.columns.items()},
        )
        data = replace(
            scene.data,
            # A minute apart, each user's from zero.
            timelines=Timelines(
                channels, offsets, atoms, tuple(np.arange(len(a)) % length * 60 * 10**6 for a in atoms)
            ),
            splits={**scene.data.splits, "train": synthetic},
        )
        inner = replace(scene, data=data)
        batches = bahe_batches(inner)
        runs.append((stepper(bahe_step(batches, share=True), batches.model, inner), users))
    taken: list[list[float]] = [[] for _ in runs]
    for repetition in range(repetitions + 1):
        for seconds, (run, users), length in zip(taken, runs, HISTORY_LENGTHS, strict=True):
            spent = run(np.arange(users * length)) / users
            if repetition:  # the first step allocates
                seconds.append(spent)
    steepness = float(np.polyfit(np.log(HISTORY_LENGTHS), np.log([median(s) for s in taken]), 1)[0])
    return Row(
        metric=f"cost of a user against behaviors, {HISTORY_LENGTHS[0]} to {HISTORY_LENGTHS[-1]}",
        value=steepness,
        unit="log-log slope",
        goal="<= 1.1",
        holds=steepness <= 1.1,
    )


def epoch(scene: Scene, one_pass: Callable[[Int64], float], share: float) -> Iterable[Row]:
    """Seconds of an epoch from evenly spaced steps, and how close it is to its matrix products alone."""
    import torch

    from bahe_models import window_batch
    from bahe_models.trainer.ctr_training import precision

    split, settings = scene.split, scene.settings
    steps = planned(scene, np.arange(len(split)), settings.training.impressions_per_step)
    steps = steps[:: max(1, round(1 / share))]
    dtype = torch.bfloat16 if precision(settings.training, torch.device("cpu")) else torch.float32
    shapes = [
        (module.in_features, module.out_features)
        for module in scene.halves.deep.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    seconds, bounds = [], []
    for rows in steps:
        seconds.append(one_pass(rows))
        batch = window_batch(
            scene.data.timelines,
            split.user_N[rows],
            split.length_NC[rows],
            settings.window,
            merged=settings.model.merged,
        )
        # Bound and step alternate, so that both see the same load of the machine.
        rate = matmul_rate(list(dict.fromkeys(shapes)), len(batch.atoms_P), dtype)
        flops = 6 * len(batch.atoms_P) * sum(i * o for i, o in shapes)
        bounds.append(flops / rate)
    total = sum(seconds) / sum(map(len, steps)) * EPOCH_IMPRESSIONS
    yield Row(
        metric=f"epoch of {EPOCH_IMPRESSIONS:,} impressions, from {len(steps)} steps",
        value=total,
        unit="s",
        goal="< 40",
        holds=total < 40,
    )
    reached = sum(bounds) / sum(seconds)
    yield Row(
        metric="share of the step that is deep layers' matrix products",
        value=reached,
        unit=f"of 1, bound at {str(dtype).removeprefix('torch.')} speed in the same run",
        goal=">= 0.6",
        holds=reached >= 0.6,
    )


if __name__ == "__main__":
    main("training_cost", __doc__ or "", measure)
