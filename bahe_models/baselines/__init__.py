"""What BAHE has to beat, on the same frame: the floor, networks on IDs, trees, the LLM over long text."""

from bahe_models.baselines.din import train_din
from bahe_models.baselines.floor import floor_scores
from bahe_models.baselines.gradient_boosting import train_gradient_boosting
from bahe_models.baselines.id_only import train_id_only
from bahe_models.baselines.long_text import LongText, TokenTimelines, token_timelines

__all__ = [
    "LongText",
    "TokenTimelines",
    "floor_scores",
    "token_timelines",
    "train_din",
    "train_gradient_boosting",
    "train_id_only",
]
