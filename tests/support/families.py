"""A tiny model with random weights of every family that can be cut, and a tokenizer of its class."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, trainers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

CONTROL_TOKEN = "<|im_start|>"
"""What `tiny_tokenizer` declares beside its class's own control tokens."""

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
# Unlike in each pair of neighbours, so that a cut at the wrong place shows.
_MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]

# By Hugging Face's model type; what follows a hyphen names a variant.
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": None},
    "mistral-sliding": {**_LLAMA_LIKE, "sliding_window": 6},
    "qwen2": {k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"},
    "qwen2-sliding": {
        **{k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"},
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "qwen3": _LLAMA_LIKE,
    "qwen3-sliding": {
        **_LLAMA_LIKE,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": _MIXED,
    },
    "gemma": _LLAMA_LIKE,
    "gemma2": {**_LLAMA_LIKE, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **_LLAMA_LIKE,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": _MIXED,
    },
    "gpt2": {"vocab_size": 70, "n_positions": 64, "n_embd": 32, "n_layer": 4, "n_head": 4},
    "gpt_neox": {
        k: v for k, v in _LLAMA_LIKE.items() if k not in ("head_dim", "num_key_value_heads", "pad_token_id")
    },
    "olmo2": {k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"},
    "phi3": {k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"},
    "smollm3": {
        **{k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"},
        "no_rope_layers": [1, 0, 1, 0],
    },
}


def tiny_model(family: str) -> Any:
    """A base model of width 32, four layers and 70 words, in evaluation mode."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.split("-")[0], **SETTINGS[family])
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The usual start is so near to nought that layers hardly change what goes through them.
            if parameter.dim() > 1:
                parameter.mul_(5)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def tiny_tokenizer(family: str) -> Any:
    """A tokenizer of the class that transformers gives the family, with fewer than 70 pieces."""
    class_name = TOKENIZER_MAPPING_NAMES.get(family.split("-")[0]) or "TokenizersBackend"
    sentence_piece = class_name == "GemmaTokenizer"
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>" if sentence_piece else None))
    trained.pre_tokenizer = (  # type: ignore[assignment]
        pre_tokenizers.Metaspace() if sentence_piece else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<s>", "</s>", "<|endoftext|>"]
    trained.train_from_iterator(
        [f"hello word {CONTROL_TOKEN} {' '.join(control)} <|padding|> <mask>"],
        trainers.BpeTrainer(vocab_size=60, special_tokens=control),
    )
    if class_name == "TokenizersBackend":
        made: Any = transformers.PreTrainedTokenizerFast(
            tokenizer_object=trained,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            unk_token="<unk>",
        )
    else:
        merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
        made = getattr(transformers, class_name)(vocab=trained.get_vocab(), merges=merges)
    made.add_special_tokens({"additional_special_tokens": [CONTROL_TOKEN]})
    return made
