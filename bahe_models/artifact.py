"""A trained model as a folder: config.json, item_ids.json and model.safetensors.

The deep layers' weights are in it, so that loading needs neither the backbone's file nor the network.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bahe_core.errors import BadInput
from bahe_core.files import new_folder
from bahe_models.artifact_folder import (
    FORMAT,
    no_artifact,
    read_config,
    require_vectors_suffice,
    vector_widths_of,
)
from bahe_models.backbone import deep_from_config
from bahe_models.calibration import AS_IT_IS, Calibration
from bahe_models.config import POSITIONS_PER_PASS, ModelConfig, WindowConfig
from bahe_models.context import hash_context
from bahe_models.features import Columns, DenseFeatures
from bahe_models.given_vectors import Matrix, check_vectors
from bahe_models.metrics import probability
from bahe_models.model import BaheModel
from bahe_models.passes import plan_passes
from bahe_models.timelines import Int64, Timelines, window_batch

IMPRESSIONS_PER_PASS = 256
"""At most; and at most `POSITIONS_PER_PASS` positions."""


@dataclass
class Artifact:
    """A model with everything needed to use it."""

    model: BaheModel
    model_version: str
    encoder_version: str
    deep_config: dict[str, Any]
    """Hugging Face configuration of the deep half."""
    window: WindowConfig
    dense: DenseFeatures
    item_ids: tuple[str | int, ...]
    """Items of the ID table, in the order of its rows 1, 2, ..."""
    facts: dict[str, Any]
    """Provenance and quality: frame, dataset, configuration, metrics."""
    logit_shift: float = 0.0
    """Added to the model's logits: the correction for sampling and weights in training."""
    calibration: Calibration = AS_IT_IS
    """Of those logits, on impressions that training did not learn from."""

    @property
    def vector_width(self) -> int:
        """Width of user and item vectors."""
        return self.model.config.vector_width

    @property
    def context_columns(self) -> tuple[str, ...]:
        """Names of the context columns that `score` expects."""
        return () if self.model.context is None else self.model.context.columns

    @property
    def vectors(self) -> dict[str, int]:
        """Widths of the vectors of the feature store that `score` expects, by `view:feature`."""
        return {} if self.model.vectors is None else self.model.vectors.widths

    @property
    def vectors_suffice(self) -> bool:
        """Whether `score` works, from stored vectors; if not, use `score_timelines`."""
        return self.model.config.vectors_suffice

    def save(self, folder: Path) -> None:
        """Write the folder atomically: it is complete or absent."""
        from safetensors.torch import save_file

        config = {
            "format": FORMAT,
            "model_version": self.model_version,
            "encoder_version": self.encoder_version,
            "deep": self.deep_config,
            "width": self.model.aggregator.start_D.numel(),
            "model": asdict(self.model.config),
            "window": asdict(self.window),
            "dense": asdict(self.dense),
            "context": list(self.context_columns),
            "vectors": self.vectors,
            "logit_shift": self.logit_shift,
            "calibration": asdict(self.calibration),
            "facts": self.facts,
        }
        state = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        with new_folder(folder) as part:
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            (part / "item_ids.json").write_text(json.dumps(self.item_ids) + "\n")
            save_file(state, part / "model.safetensors")
            # safetensors lets its owner alone read a file, whatever the umask; others may serve the home.
            (part / "model.safetensors").chmod(stat.S_IMODE((part / "config.json").stat().st_mode))

    @torch.inference_mode()
    def user_vectors(
        self,
        atoms_AD: torch.Tensor,
        atom_ids_A: Int64,
        timelines: Timelines,
        user_N: Int64,
        length_NC: Int64,
    ) -> npt.NDArray[np.float32]:
        """User vectors [N, width] after the first `length_NC` behaviors of each user's timelines.

        `atoms_AD` must come from this artifact's encoder_version and be on the model's device;
        `atom_ids_A` are their atom ids.
        """
        self._check_width(atoms_AD)
        self.model.eval()
        id_row_A = self.model.behavior_rows(torch.tensor(atom_ids_A, device=atoms_AD.device))
        vectors = np.empty((len(user_N), self.vector_width), dtype=np.float32)
        merged = self.model.config.merged
        for rows in self._passes(user_N, length_NC):
            batch = window_batch(timelines, user_N[rows], length_NC[rows], self.window, merged=merged)
            vectors[rows] = self.model.user_vectors(atoms_AD, batch, id_row_A).cpu().numpy()
        return vectors

    @property
    def trained_until(self) -> datetime | None:
        """When the last impression was shown that training or validation read; None in older artifacts."""
        until = self.facts.get("trained_until")
        return None if until is None else datetime.fromisoformat(until)

    def id_table_rows(self, item_ids: Sequence[str | int]) -> torch.Tensor:
        """Each item's row in the ID table [N]; 0 for items unseen in training."""
        row = {item_id: index for index, item_id in enumerate(self.item_ids, start=1)}
        return torch.tensor([row.get(item_id, 0) for item_id in item_ids], dtype=torch.long)

    @torch.inference_mode()
    def item_vectors(
        self, atoms_ND: torch.Tensor, item_ids: Sequence[str | int]
    ) -> npt.NDArray[np.float32]:
        """Item vectors [N, width] from the vectors of the items' texts, in the order of the ids."""
        self._check_width(atoms_ND)
        self.model.eval()
        rows_N = self.id_table_rows(item_ids).to(atoms_ND.device)
        vectors: npt.NDArray[np.float32] = self.model.item_vectors(atoms_ND, rows_N).cpu().numpy()
        return vectors

    @torch.inference_mode()
    def score(
        self,
        user_NV: npt.NDArray[np.float32],
        item_NV: npt.NDArray[np.float32],
        columns: Columns,
        length_NC: Int64,
        now_us_N: Int64,
        context: Mapping[str, Sequence[object]] | Int64 | None = None,
        vectors: Mapping[str, Matrix] | None = None,
    ) -> npt.NDArray[np.float64]:
        """Click probabilities [N] of pairs of stored vectors and their statistics.

        `context` holds the values of each of `context_columns`, None where unknown, or their hashes
        [N, X]; `vectors` a matrix [N, D] for each of `Artifact.vectors`, NaN where unknown. Raises BadInput
        when a column or vector is missing, unknown or of another shape, and NotServable when stored vectors
        do not suffice (see `score_timelines`).
        """
        require_vectors_suffice(self.model_version, self.model.config)
        if self.model.training:  # asked first, since setting it visits every layer: 1 ms
            self.model.eval()
        hashed_NX = self._hashed(context, len(user_NV))
        given = check_vectors(self.vectors, vectors, len(user_NV))
        dense_NF = torch.from_numpy(self.dense.transform(columns, length_NC, now_us_N))
        logits_N = self.model.score(
            torch.from_numpy(user_NV),
            torch.from_numpy(item_NV),
            dense_NF,
            torch.from_numpy(hashed_NX),
            vectors=[torch.from_numpy(values) for values in given.values()],
        )
        return self._probabilities(logits_N)

    @torch.inference_mode()
    def score_timelines(
        self,
        atoms_AD: torch.Tensor,
        atom_ids_A: Int64,
        timelines: Timelines,
        user_N: Int64,
        length_NC: Int64,
        item_atom_N: Int64,
        item_ids: Sequence[str | int],
        columns: Columns,
        now_us_N: Int64,
        context: Mapping[str, Sequence[object]] | Int64 | None = None,
        vectors: Mapping[str, Matrix] | None = None,
    ) -> npt.NDArray[np.float64]:
        """Click probabilities [N] of impressions, from timelines instead of stored vectors.

        Works with every head. `atoms_AD` must come from this artifact's encoder_version and be on the
        model's device; `item_atom_N` are the rows of the items' texts in it, and `length_NC` counts the
        behaviors of each timeline strictly before the impression. `context` and `vectors` are those of
        `score`.
        """
        self._check_width(atoms_AD)
        self.model.eval()
        hashed_NX = torch.from_numpy(self._hashed(context, len(user_N))).to(atoms_AD.device)
        given = check_vectors(self.vectors, vectors, len(user_N))
        device = atoms_AD.device
        id_row_A = self.model.behavior_rows(torch.tensor(atom_ids_A, device=device))
        dense_NF = torch.from_numpy(self.dense.transform(columns, length_NC, now_us_N)).to(device)
        item_row_N = self.id_table_rows(item_ids).to(device)
        logits_N = torch.empty(len(user_N), device=device)
        merged = self.model.config.merged
        for rows in self._passes(user_N, length_NC):
            index = torch.from_numpy(rows).to(device)
            batch = window_batch(timelines, user_N[rows], length_NC[rows], self.window, merged=merged)
            user_NV = self.model.user_vectors(atoms_AD, batch, id_row_A)
            item_NV = self.model.item_vectors(atoms_AD[item_atom_N[rows]], item_row_N[index])
            interest_NT = self.model.interests(atoms_AD, timelines, user_N[rows], length_NC[rows], item_NV)
            logits_N[index] = self.model.score(
                user_NV,
                item_NV,
                dense_NF[index],
                hashed_NX[index],
                interest_NT,
                [torch.from_numpy(values[rows]).to(device) for values in given.values()],
            )
        return self._probabilities(logits_N)

    def _passes(self, user_N: Int64, length_NC: Int64) -> Iterator[Int64]:
        return plan_passes(
            user_N,
            length_NC,
            self.window,
            impressions=IMPRESSIONS_PER_PASS,
            positions=POSITIONS_PER_PASS,
            merged=self.model.config.merged,
        )

    def _check_width(self, atoms_AD: torch.Tensor) -> None:
        width = self.model.aggregator.start_D.numel()
        if atoms_AD.shape[1] != width:
            raise BadInput(
                f"the atom vectors have width {atoms_AD.shape[1]}, but {self.model_version} reads {width};"
                f" give it those of {self.encoder_version}."
            )

    def _probabilities(self, logits_N: torch.Tensor) -> npt.NDArray[np.float64]:
        corrected_N = self.calibration.apply((logits_N.double() + self.logit_shift).cpu().numpy())
        return probability(corrected_N)

    def _hashed(self, context: Mapping[str, Sequence[object]] | Int64 | None, count: int) -> Int64:
        columns = self.context_columns
        if not isinstance(context, np.ndarray):
            return hash_context(columns, context or {}, count)
        if context.shape != (count, len(columns)):
            raise BadInput(
                f"hashed context has shape {list(context.shape)}, not {[count, len(columns)]}; give one"
                f" hash for each row and each of {', '.join(columns) or 'no columns'}."
            )
        return context


def load(folder: Path | str) -> Artifact:
    """Read an artifact. Raises BadInput when the folder is not one, or is damaged, NotWritable when it may
    not be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config = read_config(folder)
    try:
        item_ids = tuple(json.loads((folder / "item_ids.json").read_text()))
        (folder / "model.safetensors").open("rb").close()  # safetensors calls one it may not read absent
        state = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise no_artifact(folder, error) from None
    dense: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["dense"].items()}
    features = DenseFeatures(**dense)
    shape = ModelConfig(**{"facts_width": 0} | config["model"])  # older artifacts have no network on facts
    model = BaheModel(
        deep_from_config(config["deep"]) if shape.deep else torch.nn.Identity(),
        width=config["width"],
        channels=len(features.channels),
        items=len(item_ids),
        dense_features=len(features.names),
        config=shape,
        context=config.get("context", ()),  # older artifacts have no context
        vectors=vector_widths_of(config),
        behaviors=len(state.get("collaborative.atom_ids_B", ())),
    )
    model.load_state_dict(state)
    return Artifact(
        model=model.eval(),
        model_version=config["model_version"],
        encoder_version=config["encoder_version"],
        deep_config=config["deep"],
        window=WindowConfig(**config["window"]),
        dense=features,
        item_ids=item_ids,
        facts=config["facts"],
        logit_shift=config.get("logit_shift", 0.0),  # older artifacts have no shift
        calibration=Calibration(**config.get("calibration", {})),  # nor a calibration
    )
