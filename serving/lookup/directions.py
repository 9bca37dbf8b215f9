"""Many vectors by their direction, and which of them are most alike to another.

Coordinates are standardised first. Language-model states have a few huge coordinates that carry little
information: without it any two texts have a cosine above 0.9. Vectors of users share what every user has.

Shape letters: N vectors, V their width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Half = npt.NDArray[np.float16]

SAMPLE = 2**16
"""Vectors, the first ones, whose means and deviations standardise all."""
BYTES_EACH = 2
"""Of a coordinate that is kept. Half precision moves a cosine by less than 0.001."""
_BLOCK = 2**14
"""Vectors that are searched at once."""


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Directions of N vectors, which are known by their row from here on."""

    mean_V: Float32
    scale_V: Float32
    """One over the deviation; 0 of a coordinate that is the same in all."""
    blocks: list[Half]
    """[_BLOCK or fewer, V] each, of length one; zero where a vector is the mean of all."""

    @classmethod
    def of(cls, parts: Iterable[Float32]) -> Directions:
        """Of vectors that come in parts [_, V], and are let go of as they come."""
        first: list[Float32] = []
        so_far, rest = 0, iter(parts)
        for part in rest:
            first.append(part)
            so_far += len(part)
            if so_far >= SAMPLE:
                break
        if not so_far:
            nothing = np.zeros(1, dtype=np.float32)  # which goes with vectors of any width
            return cls(mean_V=nothing, scale_V=nothing, blocks=[])
        mean_V, deviation_V = _moments(first, so_far)
        # What is left of a constant by rounding is no deviation.
        varies_V = deviation_V > 1e-5 * np.abs(mean_V)
        scale_V = np.divide(1, deviation_V, out=np.zeros_like(deviation_V), where=varies_V)
        directions = cls(mean_V=mean_V.astype(np.float32), scale_V=scale_V.astype(np.float32), blocks=[])
        while first:
            directions._add(first.pop(0))
        for part in rest:
            directions._add(part)
        return directions

    def _add(self, part_NV: Float32) -> None:
        for start in range(0, len(part_NV), _BLOCK):
            self.blocks.append(self._directed(part_NV[start : start + _BLOCK]).astype(np.float16))

    def _directed(self, vectors_NV: Float32) -> Float32:
        standard_NV = (vectors_NV - self.mean_V) * self.scale_V
        norm_N1 = np.linalg.norm(standard_NV, axis=1, keepdims=True).clip(1e-12)
        directed_NV: Float32 = standard_NV / norm_N1
        return directed_NV

    def to(self, vector_V: Float32) -> Float32:
        """The direction of another vector of the same kind."""
        direction_V: Float32 = self._directed(vector_V[None])[0]
        return direction_V

    def at(self, row: int) -> Float32:
        """The direction of a row."""
        for block in self.blocks:
            if row < len(block):
                direction_V: Float32 = block[row].astype(np.float32)
                return direction_V
            row -= len(block)
        raise IndexError(row)

    def nearest(self, direction_V: Float32, k: int) -> list[tuple[int, float]]:
        """Rows and cosines of the k that point most nearly that way, nearest first."""
        from usearch.index import search

        asked_V = direction_V.astype(np.float16)
        found: list[tuple[int, float]] = []
        start = 0
        for block in self.blocks:
            # numpy, which multiplies no half precision, takes four times as long.
            matches = search(block, asked_V, min(k, len(block)), "ip", exact=True, threads=1)
            cosines = (1 - matches.distances).clip(-1, 1)
            found += zip((start + matches.keys).tolist(), cosines.tolist(), strict=True)
            start += len(block)
        return sorted(found, key=lambda one: (-one[1], one[0]))[:k]


def _moments(parts: list[Float32], count: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and deviation of each coordinate."""
    mean_V = sum(part.sum(axis=0, dtype=np.float64) for part in parts) / count
    squares_V = sum(np.square(part - mean_V).sum(axis=0) for part in parts)
    return mean_V, np.sqrt(squares_V / count)
