"""Every family of language models that can be cut obeys the same laws."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import bahe_models.packing as packing_module
import bahe_models.timelines as timelines_module
from bahe_core.errors import BadInput
from bahe_models import (
    Artifact,
    AtomicEncoder,
    Backbone,
    BackboneConfig,
    BaheModel,
    Batches,
    DenseFeatures,
    EncoderConfig,
    ModelConfig,
    Timelines,
    WindowConfig,
    load,
    load_backbone,
    window_batch,
)
from bahe_models.backbone import FAMILIES, cut, deep_from_config, longest_input
from bahe_models.norms import fuse_norms
from bahe_models.packing import Packing, attend_within, read_packed
from tests.support.families import SETTINGS, tiny_model
from tests.support.toy import know_behaviors

CPU = torch.device("cpu")
CUT = BackboneConfig(path="tiny", shallow_layers=1, deep_layers=2)
TO_THE_END = BackboneConfig(path="tiny", shallow_layers=2, deep_layers=2)
IDS = torch.tensor([[0, 7, 9, 12, 30, 31, 32, 5, 6, 41], [0, 60, 3, 3, 3, 8, 69, 1, 2, 50]])


def halves_of(family: str, config: BackboneConfig = CUT) -> Backbone:
    return cut(tiny_model(family), None, config)


def build(halves: Backbone) -> BaheModel:
    torch.manual_seed(1)
    model = BaheModel(
        halves.deep,
        width=halves.width,
        channels=2,
        items=5,
        dense_features=3,
        config=ModelConfig(deep_width=8, profile_width=8, head_width=8),
        behaviors=30,
    )
    know_behaviors(model, np.arange(30))
    torch.nn.init.normal_(model.profile.gate.weight, std=0.1)
    return model.eval()


def test_every_family_is_tested() -> None:
    assert {family.split("-")[0] for family in SETTINGS} == set(FAMILIES)


@pytest.mark.parametrize("family", SETTINGS)
@torch.inference_mode()
def test_the_halves_are_the_models_own_layers(family: str) -> None:
    whole = tiny_model(family)
    states = whole(IDS, output_hidden_states=True).hidden_states
    halves = cut(whole, None, TO_THE_END)
    shallow = halves.shallow(input_ids=IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(shallow, states[2], atol=1e-5, rtol=0)
    if longest_input(halves.deep):  # without positions of its own, GPT-2's deep half is the rest
        torch.nn.init.zeros_(halves.deep.wpe.weight)
    deep = halves.deep(inputs_embeds=shallow, use_cache=False).last_hidden_state
    torch.testing.assert_close(deep, states[4], atol=1e-5, rtol=0)  # after the final norm
    assert states[2].std() > 1e-3
    assert (states[4] - states[2]).abs().max() > 1e-2


@pytest.mark.parametrize("family", SETTINGS)
def test_one_pass_equals_per_impression_and_later_atoms_change_nothing(family: str) -> None:
    model = build(halves_of(family))
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 25, (2, 5))
    timelines = Timelines(
        ("a", "b"),
        tuple(np.concatenate([[0], np.cumsum(count)]) for count in counts),
        tuple(rng.integers(0, 40, count.sum()) for count in counts),
        tuple(np.arange(count.sum()) for count in counts),
    )
    user = rng.integers(0, 5, 40)
    length = rng.integers(0, timelines.lengths()[user] + 1)
    atoms = torch.from_numpy(rng.normal(size=(40, 32)).astype(np.float32))
    window = WindowConfig(size=12, overlap=7)
    with torch.inference_mode():
        id_row = model.behavior_rows(torch.arange(40))
        one_pass, reference = (
            model.user_vectors(atoms, window_batch(timelines, user, length, window, share=share), id_row)
            for share in (True, False)
        )
    torch.testing.assert_close(one_pass, reference, atol=1e-4, rtol=0)
    assert one_pass.std(dim=0).min() > 1e-4

    sequence = torch.from_numpy(rng.normal(size=(20, 32)).astype(np.float32))
    changed = sequence.clone()
    changed[12:] = torch.from_numpy(rng.normal(size=(8, 32)).astype(np.float32))
    packing = Packing.of(np.array([20]), CPU)
    with torch.inference_mode():
        before, after = model.aggregator(sequence, packing), model.aggregator(changed, packing)
    torch.testing.assert_close(before[:12], after[:12], atol=1e-5, rtol=0)
    assert (before[12:] - after[12:]).abs().amax(dim=1).min() > 1e-3


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("family", SETTINGS)
def test_packed_sequences_do_not_meet(family: str, products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """States and gradients of sequences in one row are those of transformers' own pass over each alone."""
    monkeypatch.setattr(packing_module, "_products_pay", lambda value, longest: products)
    monkeypatch.setattr(timelines_module, "_LEAST_POSITIONS", 1)
    monkeypatch.setattr(timelines_module, "_LIKE", 0.7)
    halves = halves_of(family)
    alone = copy.deepcopy(halves.deep).eval()
    packed = halves.deep.eval()
    attend_within(packed)
    fuse_norms(packed)
    # Two groups, the second one padded, and sequences longer than what sliding layers see.
    lengths = np.array([30, 30, 7, 5, 5, 1])
    inputs = torch.randn(lengths.sum(), 32, generator=torch.Generator().manual_seed(0))
    packing = Packing.of(lengths, CPU)
    assert [group.place_P is None for group in packing.groups] == [True, False, True]
    states = read_packed(packed, inputs, packing)
    expected = torch.cat(
        [
            alone(inputs_embeds=part[None], use_cache=False).last_hidden_state[0]
            for part in inputs.split(lengths.tolist())
        ]
    )
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        torch.autograd.grad((reached * weights).sum(), list(half.parameters()))
        for half, reached in ((packed, states), (alone, expected))
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("shallow_layers", [1, 2])
@torch.inference_mode()
def test_a_deep_half_is_rebuilt_from_its_configuration(family: str, shallow_layers: int) -> None:
    halves = halves_of(family, BackboneConfig(path="tiny", shallow_layers=shallow_layers, deep_layers=1))
    saved = json.loads(json.dumps(halves.deep.config.to_dict()))
    again = deep_from_config(saved).eval()
    again.load_state_dict(halves.deep.state_dict())
    sequence = torch.randn(2, 30, 32)
    for half in (halves.deep.eval(), again):
        assert not any("embed_tokens" in name or "wte" in name for name in half.state_dict())
    torch.testing.assert_close(
        again(inputs_embeds=sequence, use_cache=False).last_hidden_state,
        halves.deep(inputs_embeds=sequence, use_cache=False).last_hidden_state,
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize("family", SETTINGS)
def test_nothing_but_the_halves_stays_in_memory(family: str) -> None:
    whole: Any = tiny_model(family)
    names = FAMILIES[whole.config.model_type]
    layers = getattr(whole, names.layers)
    places = [layer.state_dict()[next(iter(layer.state_dict()))].data_ptr() for layer in layers]
    embedding = weakref.ref(getattr(whole, names.embedding))
    left_out = weakref.ref(layers[3])
    halves = cut(whole, None, CUT)
    del whole, layers
    gc.collect()
    kept: list[Any] = [*getattr(halves.shallow, names.layers), *getattr(halves.deep, names.layers)]
    # The layers have moved; they are not copies, and each knows its place and its own half's settings.
    assert [layer.state_dict()[next(iter(layer.state_dict()))].data_ptr() for layer in kept] == places[:3]
    assert left_out() is None
    assert embedding() is getattr(halves.shallow, names.embedding)
    assert getattr(halves.deep, names.embedding) is None
    configs = {id(m.config) for m in halves.deep.modules() if hasattr(m, "config")}
    rotary = {id(m.config) for name, m in halves.deep.named_modules() if name == "rotary_emb"}
    assert configs == {id(halves.deep.config)} | rotary
    assert halves.deep.config.num_hidden_layers == 2


def folder_of(model: Any, tiny_backbone: Path, folder: Path) -> Path:
    """A model's folder, with the tiny tokenizer."""
    model.save_pretrained(folder)
    for file in tiny_backbone.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("family", SETTINGS)
@torch.inference_mode()
def test_a_folder_gives_the_same_halves(family: str, tiny_backbone: Path, tmp_path: Path) -> None:
    whole = tiny_model(family)
    expected = cut(copy.deepcopy(whole), None, CUT)
    path = folder_of(whole, tiny_backbone, tmp_path / "model")
    halves = load_backbone(BackboneConfig(path=str(path), shallow_layers=1, deep_layers=2))
    assert halves.fingerprint == expected.fingerprint
    sequence = torch.randn(2, 30, 32)
    torch.testing.assert_close(
        halves.deep(inputs_embeds=sequence, use_cache=False).last_hidden_state,
        expected.deep(inputs_embeds=sequence, use_cache=False).last_hidden_state,
    )
    texts = ["word1 word2", "word3", "word4 word5 word6 word7 word8 word9 word10"]
    together = AtomicEncoder(halves, EncoderConfig(max_tokens=20), bfloat16=False)
    alone = AtomicEncoder(halves, EncoderConfig(max_tokens=20), bfloat16=False, tokens_per_batch=1)
    np.testing.assert_allclose(
        together.encode(["liked"] * 3, texts), alone.encode(["liked"] * 3, texts), atol=1e-5
    )


def refused() -> dict[str, tuple[Any, str]]:
    small: dict[str, Any] = {"vocab_size": 70, "num_attention_heads": 4}
    both_ways = {**SETTINGS["gemma3_text"], "use_bidirectional_attention": True}
    by_number = {**SETTINGS["gpt2"], "scale_attn_by_inverse_layer_idx": True}
    known = "llama, mistral"
    return {
        "t5": (transformers.T5Config(d_model=32, d_ff=64, num_layers=4, num_heads=4, vocab_size=70), known),
        "bert": (transformers.BertConfig(hidden_size=32, num_hidden_layers=4, **small), known),
        "gemma": (transformers.Gemma3TextConfig(**both_ways), "attends in both directions"),
        "gpt2": (transformers.GPT2Config(**by_number), "scales attention"),
    }


@pytest.mark.parametrize("name", ["t5", "bert", "gemma", "gpt2"])
def test_what_cannot_be_cut_is_refused_before_its_weights_are_read(name: str, tmp_path: Path) -> None:
    config, words = refused()[name]
    config.save_pretrained(tmp_path)  # and no weights
    with pytest.raises(BadInput, match=words):
        load_backbone(BackboneConfig(path=str(tmp_path), shallow_layers=1, deep_layers=1))


def test_an_architecture_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "from-the-future"}')
    with pytest.raises(BadInput, match=r"knows the model types gemma, .*qwen3"):
        load_backbone(BackboneConfig(path=str(tmp_path)))


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        load_backbone(BackboneConfig(path=str(tmp_path / "nothing")))


def test_a_model_with_missing_weights_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder_of(tiny_model("qwen3"), tiny_backbone, tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    for place, words in ((3, None), (1, r"lacks 1 weights \(layers\.1\.mlp")):
        del weights[f"layers.{place}.mlp.up_proj.weight"]
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        config = BackboneConfig(path=str(path), shallow_layers=1, deep_layers=2)
        if words is None:
            load_backbone(config)  # what lies past the cut is not missed
        else:
            with pytest.raises(BadInput, match=words):
                load_backbone(config)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3_text"])
def test_an_artifact_of_any_family_gives_the_same_users(family: str, tmp_path: Path) -> None:
    halves = halves_of(family)
    dense = DenseFeatures(channels=("a", "b"), click_rate=0.5, mean=(0.0,) * 9, deviation=(1.0,) * 9)
    model = BaheModel(
        halves.deep, width=32, channels=2, items=1, dense_features=len(dense.names), config=ModelConfig()
    )
    artifact = Artifact(
        model=model,
        model_version="m",
        encoder_version="e",
        deep_config=halves.deep.config.to_dict(),
        window=WindowConfig(size=20, overlap=10),
        dense=dense,
        item_ids=(1,),
        facts={},
    )
    artifact.save(tmp_path / "m")
    timelines = Timelines(("a", "b"), (np.array([0, 30]),) * 2, (np.arange(30),) * 2, (np.arange(30),) * 2)
    request = torch.randn(30, 32), np.arange(30), timelines, np.array([0, 0]), np.array([[30, 12], [0, 3]])
    np.testing.assert_allclose(
        load(tmp_path / "m").user_vectors(*request), artifact.user_vectors(*request), atol=1e-5
    )


def test_inputs_beyond_a_table_of_positions_are_refused() -> None:
    halves = halves_of("gpt2")
    assert longest_input(halves.shallow) == longest_input(halves.deep) == 64
    assert longest_input(halves_of("llama").deep) is None
    with pytest.raises(BadInput, match=r"encoder\.max_tokens is 64, .* at most 63"):
        AtomicEncoder(halves, EncoderConfig(max_tokens=64))
    window = WindowConfig(size=64, overlap=32)
    data: Any = SimpleNamespace(atoms_AD=np.zeros((1, halves.width), dtype=np.float32))
    with pytest.raises(BadInput, match=r"window\.size is 64, .* at most 63"):
        Batches(build(halves), data, None, window, item_row_I=None, device=CPU, bfloat16=False)  # type: ignore[arg-type]
