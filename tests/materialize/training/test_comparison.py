from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bahe_core.errors import BadInput
from bahe_models import TrainingData, auc, gauc
from materialize.config.dataset import Dataset
from materialize.training.comparison import NEW_ITEMS, Compared, Gain, compared, findings, segments_of
from materialize.training.comparison_report import shown_gain, table, write_comparison
from materialize.training.contenders import BAHE, WITH_DEEP, WITHOUT_DEEP, Fit, contenders
from tests.support.toy import toy_data

TITLES = {BAHE: "BAHE", "floor": "Floor", WITH_DEEP: "BAHE with deep layers", "twin": "A <twin>"}


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return toy_data(rows=4000)


def fits_of(data: TrainingData, noise: float, seeds: int, seconds: float) -> list[Fit]:
    """Logits that know the click, but for some noise."""
    rng = np.random.default_rng(int(noise * 1000))

    def one() -> Fit:
        logits = {
            name: split.clicked_N + noise * rng.normal(size=len(split))
            for name, split in data.splits.items()
        }
        return Fit(logits, seconds)

    return [one() for _ in range(seeds)]


@pytest.fixture(scope="module")
def rows(data: TrainingData) -> list[Compared]:
    good = fits_of(data, 1.0, 2, 10.0)
    fits = {
        BAHE: good,
        "floor": fits_of(data, 3.0, 1, 0.0),
        WITH_DEEP: [replace(fit, seconds=90.0) for fit in good],
        "twin": [replace(fit, seconds=1.0) for fit in good],
    }
    return compared(data, ["validation", "test"], fits, TITLES, BAHE)


def test_a_model_is_the_mean_of_its_seeds_on_each_split(data: TrainingData, rows: list[Compared]) -> None:
    split = data.splits["test"]
    fits = fits_of(data, 1.0, 2, 10.0)
    row = next(row for row in rows if row.model == BAHE and row.split == "test")
    aucs = [auc(split.clicked_N, fit.logits["test"]) for fit in fits]
    assert (row.auc_least, row.auc_most) == (min(aucs), max(aucs))
    assert row.auc == pytest.approx(np.mean(aucs))
    gaucs = [gauc(split.clicked_N, fit.logits["test"], split.user_N) for fit in fits]
    assert row.gauc == pytest.approx(np.mean(gaucs))
    assert row.gain is None
    assert row.seeds == 2


def test_a_difference_is_that_of_the_means_and_its_interval_holds_it(rows: list[Compared]) -> None:
    by_model = {row.model: row for row in rows if row.split == "validation"}
    gain = by_model["floor"].gain
    assert gain is not None
    assert gain.certain
    assert gain.value == pytest.approx(by_model[BAHE].auc - by_model["floor"].auc)
    assert gain.low < gain.value < gain.high
    twin = by_model["twin"]
    assert twin.gain is not None
    assert (twin.gain.low, twin.gain.value, twin.gain.high) == (0, 0, 0)
    assert twin.gauc_gain is not None
    assert not twin.gauc_gain.certain


def test_findings_name_who_is_better_and_what_deep_layers_bring(rows: list[Compared]) -> None:
    models = contenders(dataset(model={"deep": False}), [BAHE, "floor", WITH_DEEP])
    above, alike, cheaper, deep, of_test, _ = findings(rows, models, BAHE)
    assert above.startswith("on the validation split BAHE is above, by more than chance: Floor (+")
    assert "cannot be told from: BAHE with deep layers" in alike
    assert "A <twin>" in alike
    assert cheaper == "A <twin> trains in 1 s, BAHE in 10."
    assert "bring +0.0000, 95% interval +0.0000 to +0.0000" in deep
    assert "9.0 times the training time: no gain beyond chance" in deep
    assert of_test.startswith("on the test split BAHE is above")


def test_the_deep_layers_gain_has_its_sign_whichever_is_configured(data: TrainingData) -> None:
    fits = {BAHE: fits_of(data, 1.0, 1, 90.0), WITHOUT_DEEP: fits_of(data, 3.0, 1, 10.0)}

    def said(of: dict[str, list[Fit]], deep: bool) -> str:
        models = contenders(dataset(model={"deep": deep}), list(of))
        titles = {one.name: one.title for one in models}
        reference = next(iter(of))
        return findings(compared(data, ["validation"], of, titles, reference), models, reference)[-1]

    deep = said(fits, True)
    assert "the deep layers bring +" in deep
    assert "they pay" in deep
    assert said({BAHE: fits[WITHOUT_DEEP], WITH_DEEP: fits[BAHE]}, False) == deep
    assert said({WITH_DEEP: fits[BAHE], WITHOUT_DEEP: fits[WITHOUT_DEEP]}, True) == deep


def test_what_cannot_be_told_is_said(data: TrainingData) -> None:
    split = data.splits["validation"]
    alone = replace(split, user_N=np.zeros_like(split.user_N))
    data = replace(data, splits={**data.splits, "validation": alone})
    fits = {BAHE: fits_of(data, 1.0, 1, 1.0), "floor": fits_of(data, 3.0, 1, 0.0)}
    rows = compared(data, ["validation"], fits, TITLES, BAHE)
    (said,) = findings(rows, contenders(dataset(), list(fits)), BAHE)
    assert said == "the validation split has too few users or clicks to tell how sure a difference is."
    gain = rows[1].gain
    assert gain is not None
    assert shown_gain(gain) == f"{gain.value:+.4f}"
    assert "nan" not in table(rows).lower()


def test_the_page_is_drawn_where_an_interval_leaves_out_its_estimate(
    rows: list[Compared], tmp_path: Path
) -> None:
    odd = [replace(row, gain=row.gain and Gain(value=0.01, low=0.02, high=0.03)) for row in rows]
    segments = {row.split: dict.fromkeys(row.segments, 5) for row in odd}
    write_comparison(tmp_path / "page.html", "shop", "frame1", "live", odd, segments, ["look."])


def test_items_unseen_in_training_are_a_segment(data: TrainingData) -> None:
    train = data.splits["train"]
    known = replace(data, splits={**data.splits, "train": train.take(np.flatnonzero(train.item_N != 3))})
    test = data.splits["test"]
    assert (test.item_N[segments_of(known, test)[NEW_ITEMS]] == 3).all()
    assert NEW_ITEMS not in segments_of(data, test)


def test_the_page_has_its_parts(tmp_path: Path, rows: list[Compared]) -> None:
    page = tmp_path / "comparison.html"
    segments = {split: dict.fromkeys(rows[0].segments, 5) for split in ("validation", "test")}
    write_comparison(page, "a <shop>", "frame1", "nightly", rows, segments, ["look <here>."])
    text = page.read_text()
    assert "a &lt;shop&gt;" in text
    assert "A &lt;twin&gt;" in text
    assert "Look &lt;here&gt;." in text
    assert "<twin>" not in text
    assert "<here>" not in text
    assert text.count("<svg") == 2
    assert text.count("class=best") == 6  # the twins are as good as BAHE


def dataset(**sections: object) -> Dataset:
    table = {"files": "x.parquet"}
    raw = {"name": "shop", "channels": ["viewed"], "behaviors": table, "impressions": table, "items": table}
    return Dataset.model_validate(raw | sections)


def test_by_default_every_model_that_differs_is_compared() -> None:
    names = [one.name for one in contenders(dataset(), None)]
    assert names == ["floor", "id-only", "din", "gradient-boosting", WITHOUT_DEEP, BAHE]
    without = contenders(dataset(model={"deep": False}), None)
    assert [one.name for one in without][-2:] == [WITH_DEEP, BAHE]
    deep = {one.name: one.settings.model.deep for one in without}
    assert deep[WITH_DEEP]
    assert not deep[BAHE]


def test_a_variant_changes_what_it_says() -> None:
    (bahe, variant) = contenders(
        dataset(), [BAHE], ["model.recent=[8, 64]  training.epochs=7 model.deep=false"]
    )
    assert variant.settings.model.recent == (8, 64)
    assert variant.settings.training.epochs == 7
    assert not variant.settings.model.deep
    assert bahe.settings.model.deep
    assert variant.settings.training.learning_rate == bahe.settings.training.learning_rate


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("model.deap=true", "`model.deap` is not a known field; `deep` is the nearest"),
        ("training.epochs=many", "training.epochs"),
        ("freshness=live", "write SECTION.FIELD=VALUE"),
        ("backbone.deep_layers=3", "with a section of model, window, training"),
        ("model.deep", "write SECTION.FIELD=VALUE"),
        ("model.recent=[8", "is not YAML"),
        ("training.seed=5", "`--seeds` says how many"),
        ("model.deep=true", "bahe and model.deep=true are the same model here"),
        ("training.pretraining_epochs=1 model.deep=false", "pretraining_epochs"),
        ("", "write SECTION.FIELD=VALUE"),
    ],
)
def test_a_variant_that_dataset_yaml_would_refuse_is_refused(variant: str, said: str) -> None:
    with pytest.raises(BadInput) as refused:
        contenders(dataset(), [BAHE], [variant])
    assert said in str(refused.value)


def test_an_unknown_model_is_named_with_those_there_are() -> None:
    with pytest.raises(BadInput, match="model xgboost is not known; choose from floor, id-only"):
        contenders(dataset(), ["floor", "xgboost"])
    with pytest.raises(BadInput, match="no model to compare"):
        contenders(dataset(), [])
