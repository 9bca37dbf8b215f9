from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bahe_core.errors import BadInput
from bahe_models import (
    AtomicEncoder,
    Backbone,
    BackboneConfig,
    EncoderConfig,
    encoder_version,
    load_backbone,
)

TEXTS = ["word1 word2 word3", "word4", "word5 word6", "word7 word8 word9 word10 word11 word12"]
CHANNELS = ["liked"] * 4


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> Backbone:
    return load_backbone(BackboneConfig(path=str(tiny_backbone), shallow_layers=2, deep_layers=2))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_neighbours_in_a_batch_change_nothing(backbone: Backbone, pooling: str) -> None:
    config = EncoderConfig(pooling=pooling)
    together = AtomicEncoder(backbone, config, bfloat16=False).encode(CHANNELS, TEXTS)
    alone = AtomicEncoder(backbone, config, bfloat16=False, tokens_per_batch=1).encode(CHANNELS, TEXTS)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert together.dtype == np.float32
    assert together.shape == (4, 32)


def test_mean_pooling_leaves_out_the_attention_sink(backbone: Backbone) -> None:
    encoder = AtomicEncoder(backbone, EncoderConfig(), bfloat16=False)
    tokens = encoder.tokenize(["liked"], ["word1 word2"])
    assert tokens[0][0] == backbone.tokenizer.bos_token_id
    with torch.inference_mode():
        states = backbone.shallow(input_ids=torch.tensor(tokens)).last_hidden_state[0]
    np.testing.assert_allclose(encoder.encode_tokens(tokens)[0], states[1:].mean(0).numpy(), atol=1e-5)


def test_the_shallow_half_is_the_models_own_first_layers(tiny_backbone: Path, backbone: Backbone) -> None:
    from transformers import LlamaModel

    whole = LlamaModel.from_pretrained(tiny_backbone).eval()
    ids = torch.tensor([[0, 7, 9, 12]])
    with torch.inference_mode():
        states = whole(ids, output_hidden_states=True).hidden_states
        shallow = backbone.shallow(input_ids=ids).last_hidden_state
        deep = backbone.deep(inputs_embeds=shallow).last_hidden_state
    torch.testing.assert_close(shallow, states[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(deep, states[4], atol=1e-5, rtol=0)  # after the final norm
    assert len(backbone.shallow.layers) == 2
    assert backbone.deep.embed_tokens is None


def test_batches_stay_within_the_token_budget(backbone: Backbone) -> None:
    encoder = AtomicEncoder(backbone, EncoderConfig(), tokens_per_batch=12)
    tokens = [[0] * n for n in (3, 9, 4, 2, 6, 12, 1, 30)]
    batches = list(encoder.batches(tokens))
    assert sorted(np.concatenate(batches).tolist()) == list(range(8))
    for rows in batches:
        assert len(rows) == 1 or max(len(tokens[i]) for i in rows) * len(rows) <= 12


@pytest.mark.parametrize(("texts", "most"), [(80, 0.2), (8192, 0.02)])
def test_padding_is_next_to_nothing(texts: int, most: float, backbone: Backbone) -> None:
    encoder = AtomicEncoder(backbone, EncoderConfig())
    lengths = np.random.default_rng(0).integers(4, 40, texts)
    places = sum(len(rows) * lengths[rows].max() for rows in encoder.batches([[0] * n for n in lengths]))
    assert 1 - lengths.sum() / places < most


def test_the_version_names_everything_that_moves_vectors(tiny_backbone: Path, backbone: Backbone) -> None:
    config = EncoderConfig()
    versions = {
        encoder_version(backbone, config, 2),
        encoder_version(backbone, config, 3),
        encoder_version(backbone, replace(config, pooling="last"), 2),
        encoder_version(backbone, replace(config, template="{channel}: {text}"), 2),
        encoder_version(backbone, replace(config, max_tokens=4), 2),
        encoder_version(replace(backbone, fingerprint="other"), config, 2),
    }
    assert len(versions) == 6
    again = load_backbone(BackboneConfig(path=str(tiny_backbone), shallow_layers=2, deep_layers=1))
    assert encoder_version(again, config, 2) in versions


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shallow_layers": 3, "deep_layers": 3}, "has 4 layers"),
        ({"path": "/nowhere/model.gguf"}, "does not exist"),
    ],
)
def test_a_wrong_backbone_is_refused(settings: dict[str, object], words: str, tiny_backbone: Path) -> None:
    with pytest.raises(BadInput, match=words):
        load_backbone(BackboneConfig(**{"path": str(tiny_backbone), **settings}))  # type: ignore[arg-type]
