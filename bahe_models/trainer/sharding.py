"""Deep layers sharded over the processes (FSDP2), for backbones too large for one device.

Each process keeps a shard of every deep parameter, of its gradient and of the optimiser's state. A layer
is gathered only while it computes. All processes must therefore call the layers equally often, forwards
and backwards, whatever their share of a step: a `WindowBatch` is one pass even without an impression. All
other parameters are whole on every process. Checkpoints and artifacts hold whole tensors, as without
sharding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from bahe_core.errors import BadInput
from bahe_models.backbone import decoder_layers, deep_from_config
from bahe_models.model import BaheModel
from bahe_models.trainer.distributed import Processes


def require_processes() -> None:
    """Raises BadInput when there is only one process, with nothing to shard over."""
    if Processes.here().size == 1:
        raise BadInput("--shard spreads a model over several processes; start them with torchrun.")


def shard(model: BaheModel, device: torch.device) -> None:
    """Shard the model's deep layers, still on the CPU, over the processes' devices, layer by layer.

    Every process must hold the same weights. Raises BadInput when there is only one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    require_processes()
    mesh = init_device_mesh(device.type, (Processes.here().size,))
    deep = model.aggregator.deep
    assert deep is not None, "a model without deep layers has nothing to shard"
    for module in (*decoder_layers(deep), deep):
        # Also the outermost one, whose norm would otherwise stay gathered after an evaluation, so that
        # an optimiser made then would hold what is not trained.
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # The loop weights each process's loss by its rows, so gradients are summed, not averaged.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module) -> bool:
    """Whether some of the model's parameters are sharded over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Scale all gradients so that their joint norm is at most `largest`."""
    trained = [p for p in parameters if p.grad is not None]
    whole = [p for p in trained if not isinstance(p, DTensor)]
    sharded = [p for p in trained if isinstance(p, DTensor)]
    if not sharded:
        nn.utils.clip_grad_norm_(whole, largest)
        return
    norm = nn.utils.get_total_norm([p.grad for p in sharded if p.grad is not None])
    assert isinstance(norm, DTensor)
    rest = nn.utils.get_total_norm([p.grad for p in whole if p.grad is not None])
    total = torch.hypot(norm.full_tensor(), rest)
    for group in (sharded, whole):
        nn.utils.clip_grads_with_norm_(group, largest, total)


def whole_tensors(state: Any, *, keep: bool = True) -> Any:
    """A nested state with whole tensors, on the CPU, in place of sharded ones.

    A collective call; processes that do not `keep` get None for each such tensor.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, dict):
        return {name: whole_tensors(value, keep=keep) for name, value in state.items()}
    return state


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """`load_state_dict` of whole tensors, whether the model is sharded or not."""
    model.load_state_dict(sharded_weights(model, weights))


def sharded_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors, by their names in the model's state, each sharded like the model's own."""
    own = model.state_dict()
    return {name: _like(value, own[name]) for name, value in weights.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` of whole tensors, whether the optimiser's parameters are sharded or not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    placed = {
        index: {name: _like(value, parameters[index]) for name, value in parameter_state.items()}
        for index, parameter_state in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": placed})


def gathered(model: BaheModel) -> BaheModel:
    """A whole copy of a sharded model on the CPU; a collective call."""
    deep: Any = model.aggregator.deep
    model.aggregator.deep = nn.Identity()  # FSDP's modules cannot be copied
    try:
        whole = copy.deepcopy(model).cpu()
    finally:
        model.aggregator.deep = deep
    whole.aggregator.deep = deep_from_config(deep.config.to_dict())
    whole.load_state_dict(whole_tensors(model.state_dict()))
    return whole.train(model.training)


def _like(value: Any, own: Any) -> Any:
    """The value, sharded like `own` if that is sharded and of the same shape."""
    if isinstance(own, DTensor) and torch.is_tensor(value) and value.shape == own.shape:
        on_device = value.to(own.device)
        # Every process has the whole value and cuts its own shard, without communication.
        return distribute_tensor(on_device, own.device_mesh, own.placements, src_data_rank=None)
    return value
