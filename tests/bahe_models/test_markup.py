"""A text is data: a control token that is spelled out in it is read as its characters."""

from __future__ import annotations

import numpy as np
import pytest

from bahe_models import AtomicEncoder, BackboneConfig, EncoderConfig, load_backbone
from bahe_models.backbone import cut
from bahe_models.baselines import token_timelines
from materialize.config.fetch import DOWNLOADS, fetch
from tests.support.families import CONTROL_TOKEN, SETTINGS, tiny_model, tiny_tokenizer


def encoder_of(family: str, config: EncoderConfig) -> AtomicEncoder:
    halves = cut(
        tiny_model(family),
        tiny_tokenizer(family),
        BackboneConfig(path="tiny", shallow_layers=3, deep_layers=1),
    )
    return AtomicEncoder(halves, config, bfloat16=False)


def control_ids(encoder: AtomicEncoder) -> dict[int, str]:
    added = encoder.tokenizer.added_tokens_decoder
    return {place: str(token) for place, token in added.items() if token.special}


@pytest.mark.parametrize("family", [name for name in SETTINGS if "-" not in name])
def test_no_text_reaches_a_control_token(family: str) -> None:
    encoder = encoder_of(family, EncoderConfig(max_tokens=60))
    control = control_ids(encoder)
    assert CONTROL_TOKEN in control.values()
    texts = [f"{token}hello" for token in control.values()] + ["hello"]
    rows = encoder.tokenize(["liked"] * len(texts), texts)
    assert all(control.keys().isdisjoint(row[1:]) for row in rows)  # the first is the start token
    vectors = encoder.encode(["liked"] * len(texts), texts)
    assert np.abs(vectors[:-1] - vectors[-1]).max(axis=1).min() > 1e-3


def test_control_tokens_of_the_template_stay_and_those_of_a_text_do_not() -> None:
    encoder = encoder_of("qwen3", EncoderConfig(template=CONTROL_TOKEN + "{text}"))
    place = encoder.tokenizer.convert_tokens_to_ids(CONTROL_TOKEN)
    plain, marked, after = encoder.tokenize(
        ["liked"] * 3, ["hello", f"hello {CONTROL_TOKEN} word", "hello word"]
    )
    assert place in plain
    assert place not in marked
    assert place in after


def test_the_long_text_baseline_reads_markup_as_text() -> None:
    tokenizer = tiny_tokenizer("qwen3")
    timelines = token_timelines(tokenizer, [f"{CONTROL_TOKEN}hello"], np.array([0]), np.array([0, 1]))
    assert tokenizer.convert_tokens_to_ids(CONTROL_TOKEN) not in timelines.tokens


@pytest.mark.slow
def test_smollm2_reads_markup_as_text() -> None:
    path = fetch("smollm2-135m") / DOWNLOADS["smollm2-135m"].names[0]
    halves = load_backbone(BackboneConfig(path=str(path), shallow_layers=1, deep_layers=1))
    encoder = AtomicEncoder(halves, EncoderConfig(), bfloat16=False)
    marked, plain = encoder.tokenize(["liked"] * 2, ["<|im_start|>hello", "hello"])
    assert encoder.tokenizer.decode(marked[1:]) == "<|im_start|>hello"
    assert plain == [encoder.tokenizer.bos_token_id, marked[-1]]
    assert control_ids(encoder).keys().isdisjoint(marked[1:])
