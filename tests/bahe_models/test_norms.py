"""Fused norms compute what transformers' own do."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bahe_models.norms import RootMeanSquareNorm, fuse_norms


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_transformers(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(LlamaRMSNorm(64, eps=1e-5))
    theirs[0].weight.data.uniform_(0.5, 2)
    ours = copy.deepcopy(theirs)
    fuse_norms(ours)
    # A copy normalises by its own weights, not by those of what it was copied from.
    ours = copy.deepcopy(ours)
    assert isinstance(ours[0], RootMeanSquareNorm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = (torch.randn(2, 30, 64) * torch.logspace(-2, 2, 30)[:, None]).to(dtype)
    gradient = torch.randn(2, 30, 64)
    found = []
    for norm in (ours, theirs):
        given = x.clone().requires_grad_()
        out = norm(given).float()
        found.append((out, *torch.autograd.grad((out * gradient).sum(), [given, norm[0].weight])))
    for mine, reference in zip(*found, strict=True):
        assert mine.dtype == reference.dtype
        scale = reference.abs().amax(dim=-1, keepdim=True).float()
        torch.testing.assert_close(mine.float() / scale, reference.float() / scale, atol=tolerance, rtol=0)


def test_norms_of_another_formula_are_left_alone() -> None:
    half = torch.nn.Sequential(GemmaRMSNorm(8))
    fuse_norms(half)
    assert type(half[0]) is GemmaRMSNorm
