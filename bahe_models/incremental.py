"""A user's state that grows with each behavior, for serving: one step of the deep layers, not a pass.

The deep layers are causal, so what they computed for the behaviors so far (the keys and values of each
attention layer) stays right when one more arrives. A state keeps them, and equals at any moment what
`BaheModel.user_vectors` computes from the whole timelines (fp32, 1e-4).

Windows follow the rule of `timelines.window_start`. When it moves a channel's window, which happens
once every `size - overlap` behaviors, every behavior of the new window stands at another position than
in the old, so that the channel is read again from its start: one pass over at most `size` behaviors.
For that, a state keeps the atom vectors of the current windows.

Shape letters: C channels, L behaviors, D backbone width, V deep part of a vector, K profile part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bahe_models.model import BaheModel
from bahe_models.timelines import WindowConfig, window_start


class UserState:
    """One user's timelines as the deep layers and the profile remember them.

    The model is put into evaluation mode and must not be trained while states of it live. A state
    belongs to one thread at a time.
    """

    @torch.inference_mode()
    def __init__(self, model: BaheModel, window: WindowConfig, atoms_CLD: Sequence[torch.Tensor]) -> None:
        """Read whole timelines, one [L, D] tensor of atom vectors a channel, in time order.

        Raises ValueError when their number or width is not the model's.
        """
        channels = model.profile.gate.out_features
        if len(atoms_CLD) != channels:
            raise ValueError(
                f"{len(atoms_CLD)} timelines were given, but the model has {channels} channels"
            )
        model.eval()
        self.model = model
        self._channels = [
            _Channel(model, window, channel, atoms_LD) for channel, atoms_LD in enumerate(atoms_CLD)
        ]

    @classmethod
    def empty(cls, model: BaheModel, window: WindowConfig) -> UserState:
        """State of a user who has done nothing yet."""
        width = model.aggregator.start_D.numel()
        return cls(model, window, [torch.empty(0, width)] * model.profile.gate.out_features)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Behaviors per channel so far, those before the windows included."""
        return tuple(channel.length for channel in self._channels)

    @torch.inference_mode()
    def append(self, channel: int, atom_D: torch.Tensor) -> None:
        """Take in one more behavior: its channel's place in the model's order, and its atom vector.

        Raises ValueError on a channel or width that the model does not have.
        """
        if not 0 <= channel < len(self._channels):
            raise ValueError(f"channel {channel} is not one of the model's {len(self._channels)}")
        self._channels[channel].append(atom_D)

    @torch.inference_mode()
    def vector(self) -> torch.Tensor:
        """The user vector [V + K] after the behaviors so far."""
        states_1CD = torch.stack([channel.state_D for channel in self._channels])[None]
        sum_1K = torch.stack([channel.sum_K for channel in self._channels]).sum(dim=0, keepdim=True)
        behaviors = sum(len(channel.window_LD) for channel in self._channels)
        behaviors_1 = torch.tensor([behaviors], device=sum_1K.device)
        return self.model.join_channels(states_1CD.float(), sum_1K.float(), behaviors_1)[0]


class _Channel:
    """The part of a state that one channel's timeline makes."""

    def __init__(
        self, model: BaheModel, window: WindowConfig, channel: int, atoms_LD: torch.Tensor
    ) -> None:
        self.model, self.window, self.channel = model, window, channel
        self.length = len(atoms_LD)
        self.start = self._window_start()
        self._read([self._fitting(atom_D) for atom_D in atoms_LD[self.start :]])

    def append(self, atom_D: torch.Tensor) -> None:
        atom_D = self._fitting(atom_D)
        self.length += 1
        before, self.start = self.start, self._window_start()
        if self.start != before:
            self._read([*self.window_LD[self.start - before :], atom_D])
            return
        self.window_LD.append(atom_D)
        self._step(atom_D[None], atom_D[None])

    def _read(self, window_LD: list[torch.Tensor]) -> None:
        """Forget everything and read a window from its start position."""
        from transformers import DynamicCache

        deep: Any = self.model.aggregator.deep
        self.window_LD = window_LD
        self.cache = DynamicCache(config=deep.config)
        self.sum_K = torch.zeros(
            self.model.profile.projection.out_features, device=self.model.aggregator.start_D.device
        )
        start_D = self.model.aggregator.start_D
        atoms_LD = torch.stack(window_LD) if window_LD else start_D.new_empty(0, len(start_D))
        self._step(torch.cat([start_D[None], atoms_LD]), atoms_LD)

    def _step(self, inputs_LD: torch.Tensor, atoms_LD: torch.Tensor) -> None:
        """Let the deep layers read on from what is cached, and add the behaviors to the profile's sum."""
        output = self.model.aggregator.deep(
            inputs_embeds=inputs_LD[None], past_key_values=self.cache, use_cache=True
        )
        self.state_D = output.last_hidden_state[0, -1]
        if len(atoms_LD):
            present_1L = torch.ones(1, len(atoms_LD), dtype=torch.bool, device=atoms_LD.device)
            channel_1 = torch.tensor([self.channel], device=atoms_LD.device)
            self.sum_K = self.sum_K + self.model.profile(atoms_LD[None], present_1L, channel_1)[0, -1]

    def _window_start(self) -> int:
        return int(window_start(np.array(self.length), self.window))

    def _fitting(self, atom_D: torch.Tensor) -> torch.Tensor:
        start_D = self.model.aggregator.start_D
        if atom_D.shape != start_D.shape:
            raise ValueError(
                f"an atom vector has shape {tuple(atom_D.shape)}, the model's {tuple(start_D.shape)}"
            )
        # A copy of its own: the window may be read again long after the caller has reused the memory.
        return atom_D.to(start_D.device, torch.float32, copy=True)
