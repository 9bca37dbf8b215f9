"""A Hugging Face causal language model, cut into frozen shallow and trainable deep layers.

The cut is the heart of BAHE (arXiv 2403.19347, section 3): the shallow layers read the tokens of one
atomic behavior, the deep layers read a sequence of behaviors. The paper does not say where it cuts;
here that is configuration.

Both halves are models of the original's own class with fewer layers, so whatever a family does around
its layers (masks, rotary angles, Gemma's scaled token embeddings) is left to Hugging Face. A deep half of
all remaining layers, applied to the shallow half's states, is the whole model again. The exception is
GPT-2, which adds learned positions to its inputs: its deep half adds the positions of the *behaviors*, as
the rotary families' deep halves do by their angles, on top of the token positions that the shallow half
has already added.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bahe_core.errors import BadInput, one_line
from bahe_models.config import BackboneConfig


@dataclass(frozen=True)
class Family:
    """Names of the attributes that the cut moves, in models of one family."""

    layers: str
    embedding: str
    norm: str
    positions: str | None = None
    """The table of learned positions, if there is one; both halves keep it."""


_LLAMA = Family("layers", "embed_tokens", "norm")
FAMILIES = {
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": Family("h", "wte", "ln_f", positions="wpe"),
    "gpt_neox": Family("layers", "embed_in", "final_layer_norm"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
}
"""The families that can be cut, by Hugging Face's `model_type`."""

_PER_LAYER = ("layer_types", "no_rope_layers")
"""Settings of a Hugging Face configuration that hold one entry per layer."""


@dataclass(frozen=True)
class Backbone:
    """The two halves, with what they share."""

    shallow: nn.Module
    deep: nn.Module
    tokenizer: Any
    width: int
    fingerprint: str
    """SHA-256 of the shallow weights, in hexadecimal."""


def _hub_arguments(path: str) -> tuple[str, dict[str, Any]]:
    """Split a path into the arguments of `from_pretrained`; a .gguf file needs its folder and name."""
    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise BadInput(f"backbone.path {path} does not exist; run `bahe fetch smollm2-135m`.")
        return str(local.parent), {"gguf_file": local.name}
    return (str(local) if local.is_dir() else path), {}


def load_backbone(config: BackboneConfig) -> Backbone:
    """Load, cut and freeze. The shallow half has no gradients; both halves are fp32 on the CPU.

    Layers that neither half needs are not loaded. Raises BadInput when there is no such model, when
    weights or layers are missing, or when its family cannot be cut.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    name, extra = _hub_arguments(config.path)
    try:
        hf_config = AutoConfig.from_pretrained(name, **extra)
        needed = _check(hf_config, config)
        _keep_layers(hf_config, 0, needed)
        tokenizer = AutoTokenizer.from_pretrained(name, **extra)
        with _without_load_report():
            model, loading_info = AutoModel.from_pretrained(
                name, config=hf_config, dtype=torch.float32, output_loading_info=True, **extra
            )
    except OSError as error:
        raise BadInput(f"backbone.path {config.path} cannot be read ({one_line(error)}).") from None
    except ValueError as error:  # an architecture that transformers does not know
        raise BadInput(f"{_cannot_be_cut(config.path)} ({one_line(error)}).") from None
    missing = loading_info["missing_keys"]
    if missing:
        raise BadInput(
            f"backbone.path {config.path} lacks {len(missing)} weights"
            f" ({min(missing)} among them); fetch it again."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cut(model, tokenizer, config)


def cut(model: nn.Module, tokenizer: Any, config: BackboneConfig) -> Backbone:
    """Split a base model (no language-model head) into its two halves; see `load_backbone`.

    The layers are moved, not copied, and unneeded ones are freed: `model` cannot be used afterwards.
    """
    hf_config: Any = model.config
    needed = _check(hf_config, config)
    family = FAMILIES[hf_config.model_type]
    layers = getattr(model, family.layers)
    embedding, norm = getattr(model, family.embedding), getattr(model, family.norm)
    for name in (family.layers, family.embedding, family.norm):
        setattr(model, name, None)
    shallow = _half(model, layers, 0, config.shallow_layers, embedding=embedding, norm=nn.Identity())
    deep = _half(model, layers, config.shallow_layers, needed, embedding=None, norm=norm)
    shallow.requires_grad_(False).eval()
    return Backbone(
        shallow=shallow,
        deep=deep,
        tokenizer=tokenizer,
        width=int(hf_config.hidden_size),
        fingerprint=_fingerprint(shallow),
    )


def deep_from_config(config: dict[str, Any]) -> nn.Module:
    """A deep half with random weights from its saved configuration, to load weights into."""
    from transformers import AutoConfig, AutoModel

    settings = dict(config)
    hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    # The deep half never sees a token; without this, a table of random embeddings would be allocated.
    hf_config.vocab_size, hf_config.pad_token_id = 1, None
    model: nn.Module = AutoModel.from_config(hf_config)
    setattr(model, FAMILIES[hf_config.model_type].embedding, None)
    return model


def recompute_activations(half: nn.Module, on: bool) -> None:
    """Turn activation checkpointing on or off: layers keep only their input and recompute the rest."""
    hf_half: Any = half
    if on:
        hf_half.activation_checkpointing_enable()
    else:
        hf_half.activation_checkpointing_disable()


def decoder_layers(half: nn.Module) -> nn.ModuleList:
    """The layers of a half, in order."""
    hf_half: Any = half
    layers: nn.ModuleList = getattr(half, FAMILIES[hf_half.config.model_type].layers)
    return layers


def longest_input(half: nn.Module) -> int | None:
    """How many positions a half can read: the size of its table of learned positions, None without one."""
    hf_half: Any = half
    positions = FAMILIES[hf_half.config.model_type].positions
    return None if positions is None else int(getattr(hf_half, positions).num_embeddings)


def _check(hf_config: Any, config: BackboneConfig) -> int:
    """Layers that both halves need together. Raises BadInput when the model cannot be cut this way."""
    if hf_config.model_type not in FAMILIES:
        raise BadInput(f"{_cannot_be_cut(config.path)}; this one is {hf_config.model_type}.")
    causal = getattr(hf_config, "is_causal", True)
    if not causal or getattr(hf_config, "use_bidirectional_attention", False):
        raise BadInput(
            f"backbone.path {config.path} attends in both directions, so one pass cannot serve every"
            " impression of a user; choose a causal language model."
        )
    if getattr(hf_config, "scale_attn_by_inverse_layer_idx", False):
        raise BadInput(
            f"backbone.path {config.path} scales attention by the layer index, which a cut changes;"
            " choose a model without scale_attn_by_inverse_layer_idx."
        )
    needed = config.shallow_layers + config.deep_layers
    if needed > hf_config.num_hidden_layers:
        raise BadInput(
            f"backbone.shallow_layers + backbone.deep_layers is {needed}, but"
            f" {config.path} has {hf_config.num_hidden_layers} layers; lower one of them."
        )
    return needed


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep Hugging Face from listing every weight past the cut as unexpected."""
    from transformers.utils import logging

    previous = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(previous)


def _cannot_be_cut(path: str) -> str:
    return f"backbone.path {path} cannot be cut: bahe knows the model types {', '.join(FAMILIES)}"


def _keep_layers(hf_config: Any, start: int, stop: int) -> None:
    """Narrow a configuration to some of its layers."""
    for name in _PER_LAYER:
        if getattr(hf_config, name, None) is not None:
            setattr(hf_config, name, list(getattr(hf_config, name)[start:stop]))
    hf_config.num_hidden_layers = stop - start


def _half(
    shell: nn.Module,
    layers: nn.ModuleList,
    start: int,
    stop: int,
    *,
    embedding: nn.Module | None,
    norm: nn.Module,
) -> nn.Module:
    """A copy of the model's shell (the model without its layers) around some of its layers."""
    half: Any = copy.deepcopy(shell)
    family = FAMILIES[half.config.model_type]
    _keep_layers(half.config, start, stop)
    setattr(half, family.layers, nn.ModuleList(layers[start:stop]))
    setattr(half, family.embedding, embedding)
    setattr(half, family.norm, norm)
    for index, layer in enumerate(getattr(half, family.layers)):
        for module in layer.modules():
            # The key-value cache is indexed by this number, so each half counts from zero.
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
            # Attention looks up its implementation here: it must be the half's configuration.
            if hasattr(module, "config"):
                module.config = half.config
    result: nn.Module = half
    return result


def _fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
