"""Vectors of the feature store as a model is given them, checked. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bahe_core.errors import BadInput

Matrix = npt.NDArray[np.float32]


def check_vectors(
    widths: Mapping[str, int], given: Mapping[str, Matrix] | None, count: int
) -> dict[str, Matrix]:
    """What is given of `count` rows, in the order of `widths` (by `view:feature`).

    Raises BadInput when one is missing or has another shape.
    """
    found = {}
    for name, width in widths.items():
        if given is None or name not in given:
            raise BadInput(
                f"the vectors of {name} are missing; give [{count}, {width}], NaN where unknown."
            )
        if given[name].shape != (count, width):
            raise BadInput(
                f"the vectors of {name} have the shape {list(given[name].shape)}, but the model reads"
                f" {[count, width]}."
            )
        found[name] = given[name]
    return found
