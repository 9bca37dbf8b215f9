"""The model's sections of dataset.yaml, from backbone to training. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

DEFAULT_BACKBONE = "smollm2-135m"
"""What `bahe fetch` calls the demo's language model."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which language model, and where it is cut."""

    path: str = DEFAULT_BACKBONE
    """A hub name, a local folder, or a local .gguf file, of a family in `bahe_models.backbone.FAMILIES`; by
    default SmolLM2-135M-Instruct, which is fetched when it is needed."""
    shallow_layers: int = 8
    """How many of the first layers encode atoms; they are frozen."""
    deep_layers: int = 2
    """How many of the layers after the cut are kept and trained (the first ones)."""

    def __post_init__(self) -> None:
        for name in ("shallow_layers", "deep_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1")


Pooling = Literal["mean", "last"]


Storage = Literal["float32", "float16"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How an atom's text becomes tokens, and its token states one vector."""

    pooling: Pooling = "mean"
    """`mean`: over the tokens without the first, which is an attention sink; `last`: last token."""
    template: str = "{text}"
    """Text given to the model; `{channel}` and `{text}` are filled in."""
    max_tokens: int = 128
    """Longer texts are truncated to this many tokens."""
    storage: Storage = "float32"
    """`float16`: vectors are rounded to half precision, which halves their size on disk."""
    bfloat16: bool | None = None
    """Whether to compute in bfloat16; by default where the hardware multiplies it natively."""
    compile: bool = False
    """Fuse the layers' operations with `torch.compile`; needs a C++ compiler, and a minute to start."""


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How much of a timeline one pass reads."""

    size: int = 512
    """Maximum number of behaviors in one window (per channel)."""
    overlap: int = 256
    """Every impression of a longer timeline sees at least this many behaviors."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(
                f"`overlap` is {self.overlap}; it must be at least 0 and below `size`, {self.size}"
            )


HeadName = Literal["dnn", "dcn", "target"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and regularisation of what is trained on top of the atom vectors."""

    deep: bool = True
    """Whether deep layers read the timelines, which costs nearly all of the training. Without them a user
    is what the profile and collaborative parts say, sums over the behaviors, and the statistics."""
    channels: Literal["parallel", "merged"] = "parallel"
    """`parallel`: the deep layers read each channel's timeline by itself, as in the paper, and their
    states are concatenated; `merged`: one timeline of all channels in time order, one pass, one
    state, with a learned embedding of each behavior's channel. Ties are in the dataset's order of
    channels."""
    time_gaps: bool = False
    """Whether the deep layers also read the time since the previous behavior, as a learned embedding of
    `timelines.gap_buckets`. It depends on behaviors alone, not on the impression's time, so stored states
    stay valid."""
    deep_width: int = 64
    """Width of the deep part of the stored user and item vectors."""
    profile_width: int = 48
    """Width of the profile part."""
    recent: tuple[int, ...] = ()
    """Further profile parts, in which what a behavior adds has halved after so many later ones (of its
    channel, or of all if merged): `[8]` says what the user cares about now, beside what they always did.
    Each is as wide as the profile part, and costs next to nothing."""
    head: HeadName = "dnn"
    """`dnn`, `dcn`: cross layers (DCN-V2) before the DNN, or `target`: the candidate item's attention
    over the user's latest behaviors (DIN) beside the user vector, then the DNN. A `target` model reads
    the raw history for every pair, so stored vectors are not enough to score: it is for offline use, and
    cannot be embedded, published or served."""
    head_width: int = 128
    """Width of the head's hidden layer."""
    facts_width: int = 128
    """Width of the hidden layers of the network that reads the dense features by themselves, and is fitted
    to them before the rest is trained (`bahe_models.trainer.facts_start`). It is there where the dataset
    lists numeric features of its own; 0 does without."""
    cross_layers: int = 2
    """Cross layers of the `dcn` head."""
    target_history: int = 50
    """Latest behaviors of each channel that the `target` head attends to."""
    dropout: float = 0.2
    """Dropout on the user state and in the head."""
    behavior_ids: bool = True
    """Whether vectors have a collaborative part, from ID embeddings of behaviors and items."""
    id_width: int = 16
    """Width of the collaborative part."""
    item_ids: bool = True
    """Whether the deep part of an item's vector has an ID embedding beside the text."""
    item_id_dropout: float = 0.3
    """Share of items whose ID embedding is hidden in a training step, so that text is learned too."""
    context_buckets: int = 2**14
    """Rows of each context column's embedding table; values that share one cannot be told apart."""
    context_width: int = 8
    """Width of each context column's embedding."""
    context_dropout: float = 0.1
    """Share of context values hidden in a training step, so that missing values are learned too."""

    def __post_init__(self) -> None:
        if self.context_buckets < 1 or self.context_width < 1:
            raise ValueError("`context_buckets` and `context_width` must be at least 1")
        if self.facts_width < 0:
            raise ValueError("`facts_width` must not be negative")
        object.__setattr__(self, "recent", tuple(self.recent))  # JSON has lists
        if any(half_life < 1 for half_life in self.recent):
            raise ValueError("each number of `recent` must be at least 1")
        if self.target_history < 1:
            raise ValueError("`target_history` must be at least 1")
        if not 0 <= self.context_dropout < 1:
            raise ValueError("`context_dropout` must be at least 0 and below 1")

    def fields_affecting_weights(self) -> dict[str, Any]:
        """All fields, by name; models from before `deep`, `facts_width` and `recent` keep their names."""
        fields = asdict(self)
        if self.deep:
            del fields["deep"]
        if not self.facts_width:
            del fields["facts_width"]
        if not self.recent:
            del fields["recent"]
        return fields

    @property
    def merged(self) -> bool:
        """Whether the channels make one sequence."""
        return self.channels == "merged"

    @property
    def vector_width(self) -> int:
        """Width of the stored vectors."""
        return self.deep_width + sum(self.sum_widths)

    @property
    def sum_widths(self) -> list[int]:
        """Widths of the parts after the deep one: the profile, the recent ones, the collaborative part."""
        profiles = [self.profile_width] * (1 + len(self.recent))
        return [*profiles, self.id_width] if self.behavior_ids else profiles

    @property
    def vectors_suffice(self) -> bool:
        """Whether stored user and item vectors are enough to score, so that the model can be served."""
        return self.head != "target"


_NO_EFFECT_ON_WEIGHTS = ("checkpoint_seconds", "recompute")

POSITIONS_PER_PASS = 8192
"""By default; a step of MovieLens-100k reads some 1,000. With two layers of SmolLM2-135M in bfloat16 on a
CPU a pass of so many takes 0.5 to 0.8 GiB in training."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the model is trained."""

    epochs: int = 4
    """Maximum number of passes over the training impressions."""
    pretraining_epochs: int = 0
    """Passes over the timelines before training on impressions; see `bahe_models.trainer.pretraining`."""
    patience: int = 2
    """Epochs without a better validation AUC before training stops. Learning rates fall until the last of
    `epochs`, so that the later ones bring most: one that is not better says little."""
    impressions_per_step: int = 1000
    accumulate: int = 1
    """Steps whose gradients are accumulated into one update: large batches in the memory of small ones."""
    learning_rate: float = 1e-3
    """Peak learning rate of everything but the deep layers."""
    deep_learning_rate: float = 1e-4
    """Peak learning rate of the deep layers."""
    weight_decay: float = 0.01
    warm_up: float = 0.1
    """Share of the updates in which learning rates rise; then they fall along a cosine."""
    gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    positive_weight: float = 1.0
    """Weight of a clicked impression in the loss; predictions are corrected for it."""
    negative_rate: float = 1.0
    """Share of the unclicked impressions that each epoch draws; predictions are corrected for it."""
    positions_per_pass: int = POSITIONS_PER_PASS
    """Most positions (behaviors, and a start for each window) that the deep layers read at once, which
    bounds memory. A step with more is read in several passes whose gradients add up: the same update but
    for dropout, which each pass draws anew."""
    bfloat16: bool | None = None
    """Mixed precision; by default where the hardware multiplies bfloat16 natively."""
    recompute: bool = False
    """Activation checkpointing: deep layers recompute their activations in the backward pass. Less memory,
    more time, the same weights."""
    seed: int = 0
    checkpoint_seconds: float = 60.0
    """Most training that a kill can cost, for a run with a checkpoint; no effect on the weights."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.impressions_per_step < 1:
            raise ValueError("`epochs` and `impressions_per_step` must be at least 1")
        if self.pretraining_epochs < 0:
            raise ValueError("`pretraining_epochs` must not be negative")
        if self.accumulate < 1:
            raise ValueError("`accumulate` must be at least 1")
        if self.positions_per_pass < 1:
            raise ValueError("`positions_per_pass` must be at least 1")
        if not 0 < self.negative_rate <= 1:
            raise ValueError("`negative_rate` must be above 0 and at most 1")
        if not 0 < self.positive_weight < float("inf"):
            raise ValueError("`positive_weight` must be above 0")
        if self.checkpoint_seconds < 0:
            raise ValueError("`checkpoint_seconds` must not be negative")

    @property
    def logit_shift(self) -> float:
        """Correction of the trained logits for sampling and weighting; 0 by default."""
        from bahe_models.sampling import logit_shift

        return logit_shift(self.negative_rate, self.positive_weight)

    def fields_affecting_weights(self) -> dict[str, Any]:
        """The fields that affect the trained weights, by name."""
        fields = {name: value for name, value in asdict(self).items() if name not in _NO_EFFECT_ON_WEIGHTS}
        if self.positions_per_pass == POSITIONS_PER_PASS:  # models from before this field keep their names
            del fields["positions_per_pass"]
        return fields
