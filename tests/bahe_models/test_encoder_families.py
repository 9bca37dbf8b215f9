"""Vectors of every family equal what one text alone gives in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from bahe_core.errors import BadInput
from bahe_models import AtomicEncoder, Backbone, BackboneConfig, EncoderConfig, encoder_version
from bahe_models.backbone import cut
from tests.support.families import SETTINGS, tiny_model

RNG = np.random.default_rng(0)
TEXTS = [" ".join(f"word{i}" for i in RNG.integers(0, 60, n)) for n in (1, 2, 9, 9, 3, 17, 30, 12, 5)]
CHANNELS = ["liked"] * len(TEXTS)


def tiny_halves(family: str, tokenizer_folder: Path) -> Backbone:
    config = BackboneConfig(path="tiny", shallow_layers=3, deep_layers=1)
    return cut(tiny_model(family), AutoTokenizer.from_pretrained(tokenizer_folder), config)


def alone(halves: Backbone, encoder: AtomicEncoder, pooling: str) -> np.ndarray:
    """The plain way: one text, float32, Hugging Face's model as it is."""
    rows = []
    for ids in encoder.tokenize(CHANNELS, TEXTS):
        with torch.inference_mode():
            states_SD = halves.shallow(input_ids=torch.tensor([ids])).last_hidden_state[0]
        rows.append(states_SD[1:].mean(0) if pooling == "mean" else states_SD[-1])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("family", SETTINGS)
def test_batches_equal_one_text_alone(family: str, tiny_backbone: Path) -> None:
    halves = tiny_halves(family, tiny_backbone)
    for pooling in ("mean", "last"):
        config = EncoderConfig(pooling=pooling, max_tokens=40)  # type: ignore[arg-type]
        exact = AtomicEncoder(halves, config, bfloat16=False, tokens_per_batch=48)
        expected = alone(halves, exact, pooling)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(exact.encode(CHANNELS, TEXTS), expected, atol=1e-5 * scale)
        rough = AtomicEncoder(halves, config, bfloat16=True, tokens_per_batch=48)
        found = rough.encode(CHANNELS, TEXTS)
        distance = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert distance.max() < 0.05
        assert found.dtype == np.float32
    # The halves are as they were: what is trained on them later is float32.
    assert {weight.dtype for weight in halves.shallow.parameters()} == {torch.float32}


def test_half_precision_is_rounded_and_has_a_version_of_its_own(tiny_backbone: Path) -> None:
    halves = tiny_halves("llama", tiny_backbone)
    full, half = EncoderConfig(), EncoderConfig(storage="float16")
    exact = AtomicEncoder(halves, full, bfloat16=False).encode(CHANNELS, TEXTS)
    rounded = AtomicEncoder(halves, half, bfloat16=False).encode(CHANNELS, TEXTS)
    np.testing.assert_array_equal(rounded, exact.astype(np.float16).astype(np.float32))
    assert encoder_version(halves, full, 3) != encoder_version(halves, half, 3)
    for same in (EncoderConfig(bfloat16=True), EncoderConfig(compile=True)):
        assert encoder_version(halves, same, 3) == encoder_version(halves, full, 3)


def test_what_half_precision_cannot_hold_is_refused(tiny_backbone: Path) -> None:
    halves = tiny_halves("llama", tiny_backbone)
    with torch.no_grad():
        for weight in halves.shallow.embed_tokens.parameters():  # type: ignore[operator, union-attr]
            weight.mul_(1e6)
    encoder = AtomicEncoder(halves, EncoderConfig(storage="float16"), bfloat16=False)
    with pytest.raises(BadInput, match=r"encoder.storage is float16.*set it to float32"):
        encoder.encode(CHANNELS, TEXTS)
