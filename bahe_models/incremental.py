"""A user's state that grows with each behavior, for serving: one step of the deep layers, not a pass.

The deep layers are causal, so what they computed for the behaviors so far (the keys and values of each
attention layer) stays valid when one more arrives. A state keeps them, and always equals what
`BaheModel.user_vectors` computes from the whole timelines (fp32, 1e-4).

Windows follow the rule of `timelines.window_start`. When it moves a sequence's window, once every
`size - overlap` behaviors, every behavior changes position, so the new window is read from its start: one
pass over at most `size` behaviors. For that, a state keeps the behaviors of the current windows.

Shape letters: C channels, S sequences, L behaviors, D backbone width, V deep part of a vector, K its
sums, B what a behavior adds to them, H half-lives of fading sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bahe_models.config import WindowConfig
from bahe_models.model import BaheModel, joined
from bahe_models.timelines import Int64, Timelines, gap_buckets, window_start


class UserState:
    """One user's timelines as the model remembers them.

    The model is put into evaluation mode and must not be trained while its states are in use. A state
    belongs to one thread at a time.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: BaheModel,
        window: WindowConfig,
        atoms_CLD: Sequence[torch.Tensor],
        time_us_CL: Sequence[Int64],
        atom_ids_CL: Sequence[Int64],
    ) -> None:
        """Read whole timelines: a channel's atom vectors [L, D], times [L] and atom ids [L], in time order.

        Raises ValueError when their number or width is not the model's, when a channel has more or fewer
        times or ids than vectors, or when time goes backwards within a channel.
        """
        channels = model.profile.gate.out_features
        for kind, given in (("timelines", atoms_CLD), ("times", time_us_CL), ("atom ids", atom_ids_CL)):
            if len(given) != channels:
                raise ValueError(
                    f"{kind} of {len(given)} channels were given, but the model has {channels}"
                )
        counts = [len(atoms_LD) for atoms_LD in atoms_CLD]
        if any(counts != list(map(len, given)) for given in (time_us_CL, atom_ids_CL)):
            raise ValueError("a channel needs as many times and atom ids as atom vectors")
        for atoms_LD in atoms_CLD:
            _check_width(model, atoms_LD)
        model.eval()
        self.model = model
        self._lengths = counts
        ends = np.cumsum(counts)
        timelines = Timelines(
            tuple(map(str, range(channels))),
            tuple(np.array([0, count]) for count in counts),
            tuple(np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)),
            tuple(time_us_CL),
        )
        merged = model.config.merged
        sequences = timelines.merged if merged else timelines.parallel
        atoms_BD = torch.cat(list(atoms_CLD))
        id_row_B = model.behavior_rows(torch.tensor(np.concatenate(list(atom_ids_CL)))).numpy()
        self._sequences = []
        for index, (begin, end) in enumerate(sequences.offsets):
            in_window = slice(begin + int(window_start(end - begin, window)), end)
            rows_L = sequences.atom_B[in_window]
            marks = (sequences.channel_B[in_window], sequences.gap_B[in_window], id_row_B[rows_L])
            behaviors_L = [
                _Behavior(_copied(model, atom_D), *its_marks)
                for atom_D, *its_marks in zip(
                    atoms_BD[torch.from_numpy(rows_L).to(atoms_BD.device)],
                    *(mark_L.tolist() for mark_L in marks),
                    strict=True,
                )
            ]
            read_channels = range(channels) if merged else (index,)
            latest = max(((int(time_us_CL[c][-1]), c) for c in read_channels if counts[c]), default=None)
            self._sequences.append(_Sequence(model, window, behaviors_L, int(end - begin), latest))

    @classmethod
    def empty(cls, model: BaheModel, window: WindowConfig) -> UserState:
        """State of a user who has done nothing yet."""
        channels = model.profile.gate.out_features
        no_atoms = torch.empty(0, model.aggregator.start_D.numel())
        no_numbers = [np.empty(0, dtype=np.int64)] * channels
        return cls(model, window, [no_atoms] * channels, no_numbers, no_numbers)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Behaviors per channel so far, those before the windows included."""
        return tuple(self._lengths)

    @torch.inference_mode()
    def append(self, channel: int, atom_D: torch.Tensor, time_us: int, atom_id: int) -> None:
        """Append a behavior: its channel's index in the model, atom vector, time and atom id.

        Raises ValueError on a channel or width that the model does not have, and when the behavior is out
        of order: earlier than the latest of its channel or, with merged channels, of all channels, where
        ties are in the order of channels.
        """
        if not 0 <= channel < len(self._lengths):
            raise ValueError(f"channel {channel} is not one of the model's {len(self._lengths)}")
        _check_width(self.model, atom_D[None])
        sequence = self._sequences[0 if self.model.config.merged else channel]
        id_row = int(self.model.behavior_rows(torch.tensor([atom_id])))
        sequence.append(channel, _copied(self.model, atom_D), time_us, id_row)
        self._lengths[channel] += 1

    def takes(self, channel: int, time_us: int) -> bool:
        """Whether a behavior of a channel at a time would be in order."""
        latest = self._sequences[0 if self.model.config.merged else channel].latest
        return latest is None or (time_us, channel) >= latest

    @torch.inference_mode()
    def vector(self) -> torch.Tensor:
        """The user vector [V + K] after the behaviors so far."""
        states_1SD = torch.stack([sequence.state_D for sequence in self._sequences])[None]
        sum_1K = torch.stack([sequence.sums() for sequence in self._sequences]).sum(dim=0, keepdim=True)
        behaviors = sum(len(sequence.window_L) for sequence in self._sequences)
        behaviors_1 = torch.tensor([behaviors], device=sum_1K.device)
        return self.model.join_sequences(states_1SD.float(), sum_1K.float(), behaviors_1)[0]


class _Behavior(NamedTuple):
    """One behavior as the model reads it."""

    atom_D: torch.Tensor
    channel: int
    gap: int
    id_row: int
    """Row in the collaborative part."""


class _Sequence:
    """The state of one sequence."""

    def __init__(
        self,
        model: BaheModel,
        window: WindowConfig,
        window_L: list[_Behavior],
        length: int,
        latest: tuple[int, int] | None,
    ) -> None:
        """`latest` is the last behavior's time and channel."""
        self.model, self.window, self.length, self.latest = model, window, length, latest
        self.start = self._window_start()
        self._read(window_L)

    def append(self, channel: int, atom_D: torch.Tensor, time_us: int, id_row: int) -> None:
        gap = 0
        if self.latest is not None:
            if (time_us, channel) < self.latest:
                raise ValueError(
                    f"a behavior of channel {channel} at {time_us} was appended after one of channel"
                    f" {self.latest[1]} at {self.latest[0]}; append them in order"
                )
            gap = int(gap_buckets(np.array(time_us - self.latest[0])))
        self.latest = time_us, channel
        behavior = _Behavior(atom_D, channel, gap, id_row)
        self.length += 1
        previous, self.start = self.start, self._window_start()
        if self.start != previous:
            self._read([*self.window_L[self.start - previous :], behavior])
            return
        self.window_L.append(behavior)
        self._step([behavior])

    def _read(self, window_L: list[_Behavior]) -> None:
        """Forget everything and read a window from its start position."""
        from transformers import DynamicCache

        deep: Any = self.model.aggregator.deep
        self.window_L = window_L
        self.cache = None if deep is None else DynamicCache(config=deep.config)
        config, device = self.model.config, self.model.aggregator.start_D.device
        added = config.profile_width + (config.id_width if config.behavior_ids else 0)
        self.sum_B = torch.zeros(added, device=device)
        self.fading_HB = torch.zeros(len(config.recent), config.profile_width, device=device)
        self._step(window_L, self.model.aggregator.start_D[None])

    def _step(self, behaviors: list[_Behavior], start_1D: torch.Tensor | None = None) -> None:
        """Run the deep layers on from the cache, and add the behaviors to the sums."""
        inputs = [] if start_1D is None else [start_1D]
        if behaviors:
            atoms_PD = torch.stack([behavior.atom_D for behavior in behaviors])
            marks = [[getattr(b, name) for b in behaviors] for name in ("channel", "gap", "id_row")]
            channel_P, gap_P, id_row_P = torch.tensor(marks, device=atoms_PD.device)
            inputs.append(self.model.behaviors(atoms_PD, channel_P, gap_P))
            present_P = torch.ones_like(channel_P, dtype=torch.bool)
            added_PB = self.model.added(atoms_PD, present_P, channel_P, id_row_P)
            self.sum_B = self.sum_B + added_PB.sum(dim=0)
            self.fading_HB = self._faded(added_PB[:, : self.model.config.profile_width])
        if self.model.aggregator.deep is None:
            self.state_D = torch.zeros_like(self.model.aggregator.start_D)
            return
        output = self.model.aggregator.deep(
            inputs_embeds=torch.cat(inputs)[None], past_key_values=self.cache, use_cache=True
        )
        self.state_D = output.last_hidden_state[0, -1]

    def _faded(self, added_PB: torch.Tensor) -> torch.Tensor:
        """The fading sums [H, B] after some behaviors more."""
        age_P = torch.arange(len(added_PB), 0, -1, device=added_PB.device) - 1
        half_life_H1 = torch.tensor(self.model.config.recent, device=added_PB.device).reshape(-1, 1)
        before_H1 = 0.5 ** (len(added_PB) / half_life_H1)
        faded_HB: torch.Tensor = self.fading_HB * before_H1 + 0.5 ** (age_P / half_life_H1) @ added_PB
        return faded_HB

    def sums(self) -> torch.Tensor:
        """The sums after the behaviors so far [K]."""
        width = self.model.config.profile_width
        return joined(self.sum_B[None], [part_B[None] for part_B in self.fading_HB], width)[0]

    def _window_start(self) -> int:
        return int(window_start(np.array(self.length), self.window))


def _check_width(model: BaheModel, atoms_LD: torch.Tensor) -> None:
    given, expected = tuple(atoms_LD.shape[1:]), tuple(model.aggregator.start_D.shape)
    if given != expected:
        raise ValueError(f"an atom vector has shape {given}, but the model reads {expected}")


def _copied(model: BaheModel, atom_D: torch.Tensor) -> torch.Tensor:
    # Always a copy: the window may be read again long after the caller has reused the memory.
    return atom_D.to(model.aggregator.start_D.device, torch.float32, copy=True)
