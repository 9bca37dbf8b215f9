"""The atomic encoder: frozen shallow layers turn one behavior's text into one vector.

Precision: where the hardware multiplies bfloat16 matrices, weights and states are bfloat16 (sums inside
norms, softmax and pooling are float32). Vectors then lie within about 1 % of float32's, far closer than two
atoms do; `python -m benchmarks.encode` measures what that means for a model trained on them. The precision
of the computation is therefore not part of the encoder_version: a home moves between machines, and a
service on one encodes texts to go with vectors from another. The *stored* precision, `storage`, is part of
it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from bahe_core.errors import BadInput, one_line
from bahe_models.backbone import Backbone, longest_input
from bahe_models.config import EncoderConfig
from bahe_models.norms import fuse_norms
from bahe_models.packing import attend_within

TOKENS_PER_BATCH = {"cpu": 1024}
"""On a CPU a layer's activations for this many tokens stay in the core's cache, which saved a quarter of
the time compared with four times as many."""
TOKENS_PER_BATCH_ELSEWHERE = 16384
_LIKE, _LEAST_TOKENS = 1.125, 256
"""A batch of at least `_LEAST_TOKENS` tokens takes no text more than `_LIKE` times as long as its shortest:
padding would cost more than fuller batches gain."""


def encoder_version(backbone: Backbone, config: EncoderConfig, shallow_layers: int) -> str:
    """Name of the vector space: equal versions give equal vectors; never mix vectors of two versions.

    It covers settings, not texts, so it did not change when control tokens in texts became plain text: all
    other texts keep their vectors, and a home keeps those that it has stored.
    """
    facts = {
        "weights": backbone.fingerprint,
        "shallow_layers": shallow_layers,
        "pooling": config.pooling,
        "template": config.template,
        "max_tokens": config.max_tokens,
    }
    if config.storage != "float32":  # keep hashes from before `storage` existed
        facts["storage"] = config.storage
    return "enc-" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


class AtomicEncoder:
    """Encodes texts in batches of nearly equal length, so that padding costs next to nothing.

    Raises BadInput when `max_tokens` exceeds the backbone's positions.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: EncoderConfig,
        *,
        device: torch.device | None = None,
        bfloat16: bool | None = None,
        tokens_per_batch: int | None = None,
    ) -> None:
        limit = longest_input(backbone.shallow)
        if limit is not None and config.max_tokens >= limit:
            raise BadInput(
                f"encoder.max_tokens is {config.max_tokens}, but the backbone reads at most {limit - 1}"
                " tokens after the start token; lower it."
            )
        self.config = config
        self.tokenizer = backbone.tokenizer
        added = self.tokenizer.added_tokens_decoder.values()
        self._control_tokens = [str(token) for token in added if token.special]
        self.width = backbone.width
        self.device = device or torch.device("cpu")
        requested = config.bfloat16 if bfloat16 is None else bfloat16
        self.bfloat16 = hardware_has_bfloat16(self.device) if requested is None else requested
        self.shallow = _placed(
            backbone.shallow, self.device, torch.bfloat16 if self.bfloat16 else torch.float32
        )
        if self.bfloat16 and self.device.type == "cpu":
            # About 5 % faster there than transformers' own.
            fuse_norms(self.shallow)
            attend_within(self.shallow)
        self._forward: Any = torch.compile(self.shallow, dynamic=True) if config.compile else self.shallow
        default = TOKENS_PER_BATCH.get(self.device.type, TOKENS_PER_BATCH_ELSEWHERE)
        self.tokens_per_batch = tokens_per_batch or default

    def tokenize(self, channels: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, after the template, at most `max_tokens` long, never empty.

        A text is data: anything in it that looks like a control token is read as plain characters.
        Control tokens of the template itself are kept, except around a text that contains one.
        """
        filled = [
            self.config.template.format(channel=channel, text=text)
            for channel, text in zip(channels, texts, strict=True)
        ]
        ids = self._token_ids(filled, control_tokens=False)
        if self._has_control_token(self.config.template):
            trusted = [
                i
                for i, words in enumerate(zip(channels, texts, strict=True))
                if not any(map(self._has_control_token, words))
            ]
            if trusted:
                rows = self._token_ids([filled[i] for i in trusted], control_tokens=True)
                for i, row in zip(trusted, rows, strict=True):
                    ids[i] = row
        start = self.tokenizer.bos_token_id
        if start is None:
            start = self.tokenizer.eos_token_id
        # A start token in front becomes the attention sink, so that no word of a short text does.
        return [row if row[:1] == [start] else [start, *row] for row in ids]

    def _token_ids(self, texts: list[str], *, control_tokens: bool) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.config.max_tokens,
            add_special_tokens=True,
            split_special_tokens=not control_tokens,
        )["input_ids"]
        return ids

    def _has_control_token(self, text: str) -> bool:
        return any(token in text for token in self._control_tokens)

    def batches(self, tokens: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Indices of the texts of each batch: sorted by length, within the token budget."""
        lengths = np.array([len(row) for row in tokens], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        start = 0
        while start < len(order):
            shortest, stop = lengths[order[start]], start + 1
            while stop < len(order):
                longest, count = lengths[order[stop]], stop - start
                too_long = longest > _LIKE * shortest and longest * count >= _LEAST_TOKENS
                if too_long or longest * (count + 1) > self.tokens_per_batch:
                    break
                stop += 1
            yield order[start:stop]
            start = stop

    @torch.inference_mode()
    def encode_tokens(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors of one batch of token rows: float32, [texts, width]."""
        longest = max(len(row) for row in tokens)
        ids_BS = np.full((len(tokens), longest), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask_BS = np.zeros((len(tokens), longest), dtype=np.bool_)
        for row, line in enumerate(tokens):
            ids_BS[row, : len(line)] = line
            mask_BS[row, : len(line)] = True
        mask = torch.from_numpy(mask_BS).to(self.device)
        states_BSD = self._states(torch.from_numpy(ids_BS).to(self.device)).float()
        if self.config.pooling == "last":
            last_B = mask.sum(dim=1) - 1
            pooled_BD = states_BSD[torch.arange(len(tokens), device=self.device), last_B]
        else:
            mask[:, 0] = mask.sum(dim=1) == 1  # the first token counts only if it is alone
            weight_BS = mask.float()
            pooled_BD = torch.einsum("bsd,bs->bd", states_BSD, weight_BS)
            pooled_BD = pooled_BD / weight_BS.sum(dim=1, keepdim=True)
        return self._stored(pooled_BD.cpu().numpy())

    def _states(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, S, D]. Causal attention never looks to the right, so right padding needs
        no mask."""
        try:
            states_BSD: torch.Tensor = self._forward(input_ids=ids_BS, use_cache=False).last_hidden_state
        except torch._dynamo.exc.TorchDynamoException as error:
            raise BadInput(
                f"encoder.compile does not work here ({one_line(error)}); install a C++ compiler, or"
                " leave it out."
            ) from None
        return states_BSD

    def _stored(self, vectors: np.ndarray) -> np.ndarray:
        """The vectors rounded as `storage` says, still float32. Raises BadInput beyond float16's range."""
        if self.config.storage == "float32":
            return vectors
        with np.errstate(over="ignore"):
            rounded = vectors.astype(np.float16).astype(np.float32)
        if not (np.isfinite(rounded) | ~np.isfinite(vectors)).all():
            raise BadInput(
                f"encoder.storage is float16, which ends at 65504, but a vector of this backbone reaches"
                f" {np.abs(vectors).max():.6g}; set it to float32."
            )
        return rounded

    def encode(self, channels: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Vectors of the texts, in their order: float32, [texts, width]."""
        tokens = self.tokenize(channels, texts)
        vectors = np.empty((len(texts), self.width), dtype=np.float32)
        for batch in self.batches(tokens):
            vectors[batch] = self.encode_tokens([tokens[i] for i in batch])
        return vectors


def _placed(shallow: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The layers on `device` with weights of type `dtype`; weights that already match are shared.

    Buffers keep their type: rotary angles in bfloat16 would be wrong from a few hundred positions on.
    """
    moved: dict[int, object] = {
        id(weight): nn.Parameter(weight.to(device, dtype), requires_grad=False)
        for weight in shallow.parameters()
    }
    return copy.deepcopy(shallow, moved).to(device)


def hardware_has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware on this device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return False
