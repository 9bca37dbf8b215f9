"""A Hugging Face causal language model, cut into frozen shallow and trainable deep layers.

The cut is the heart of BAHE (arXiv 2403.19347, section 3): the shallow layers read the tokens of one
atomic behavior, the deep layers read a sequence of behaviors. The paper does not say where it cuts;
here that is configuration.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bahe_core.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which language model, and where it is cut."""

    path: str
    """A hub name, a local folder, or a local .gguf file."""
    shallow_layers: int = 8
    """The first layers, frozen: they encode atoms."""
    deep_layers: int = 2
    """How many of the layers after the cut are kept and trained (a prefix of what is left)."""

    def __post_init__(self) -> None:
        for name in ("shallow_layers", "deep_layers"):
            if getattr(self, name) < 1:
                raise BadInput(f"backbone.{name} is {getattr(self, name)}; it must be at least 1.")


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

    Raises BadInput when the model has fewer layers than asked for, or its layers cannot be cut.
    """
    from transformers import AutoModel, AutoTokenizer

    name, extra = _hub_arguments(config.path)
    tokenizer = AutoTokenizer.from_pretrained(name, **extra)
    model = AutoModel.from_pretrained(name, dtype=torch.float32, **extra)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cut(model, tokenizer, config)


def cut(model: nn.Module, tokenizer: Any, config: BackboneConfig) -> Backbone:
    """Cut a base model (no language-model head) into its two halves; see `load_backbone`."""
    hf_model: Any = model  # Hugging Face's attributes are set at run time
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(getattr(model, "norm", None), nn.Module):
        raise BadInput(
            f"backbone {type(model).__name__} cannot be cut: bahe needs a decoder with `layers` and"
            " `norm`, as Llama, Qwen2, Qwen3, Mistral and SmolLM have."
        )
    shallow, deep = config.shallow_layers, config.deep_layers
    if shallow + deep > len(layers):
        raise BadInput(
            f"backbone.shallow_layers + backbone.deep_layers is {shallow + deep}, but"
            f" {config.path} has {len(layers)} layers; lower one of them."
        )
    shallow_half = _with_layers(model, layers[:shallow], keep_embedding=True, keep_norm=False)
    deep_half = _with_layers(model, layers[shallow : shallow + deep], keep_embedding=False, keep_norm=True)
    shallow_half.requires_grad_(False).eval()
    return Backbone(
        shallow=shallow_half,
        deep=deep_half,
        tokenizer=tokenizer,
        width=int(hf_model.config.hidden_size),
        fingerprint=_fingerprint(shallow_half),
    )


def deep_from_config(config: dict[str, Any], deep_layers: int) -> nn.Module:
    """Deep half with random weights from a saved Hugging Face configuration, ready for loading."""
    from transformers import AutoConfig, AutoModel

    settings = dict(config)
    hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    hf_config.num_hidden_layers = deep_layers
    # The deep half never sees a token; without this, a table of random embeddings would be made first.
    hf_config.vocab_size, hf_config.pad_token_id = 1, None
    model = AutoModel.from_config(hf_config)
    return _with_layers(model, model.layers, keep_embedding=False, keep_norm=True)


def _with_layers(
    model: nn.Module, layers: nn.ModuleList, *, keep_embedding: bool, keep_norm: bool
) -> nn.Module:
    """A copy of the model with only these layers, so that memory holds only what is used."""
    outer = {name: model._modules.pop(name) for name in ("layers", "embed_tokens", "norm")}
    try:
        half: Any = copy.deepcopy(model)
    finally:
        model._modules.update(outer)
    half.layers = copy.deepcopy(layers)
    half.embed_tokens = copy.deepcopy(outer["embed_tokens"]) if keep_embedding else None
    half.norm = copy.deepcopy(outer["norm"]) if keep_norm else nn.Identity()
    half.config.num_hidden_layers = len(layers)
    for index, layer in enumerate(half.layers):
        # The key-value cache is indexed by this number; a half starts counting at nought again.
        if hasattr(layer, "self_attn") and hasattr(layer.self_attn, "layer_idx"):
            layer.self_attn.layer_idx = index
    result: nn.Module = half
    return result


def _fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe(config: BackboneConfig) -> dict[str, Any]:
    """The configuration as plain values, for artifacts and trackers."""
    return asdict(config)
