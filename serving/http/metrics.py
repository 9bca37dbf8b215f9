"""What a service tells Prometheus of itself.

Written here, since Feast puts the process's prometheus_client into its multi-process mode, where two
services of one process, and services one after another, would add up.
https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds."""


_PUSHED = ("behaviors", "impressions", "clicks", "features")


@dataclass
class Counts:
    """What one worker counted since it started."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By route and status."""
    in_bucket: dict[str, list[int]] = field(default_factory=dict)
    """Answers of each route, by the bucket of their seconds."""
    seconds: Counter[str] = field(default_factory=Counter)
    """Of all answers of a route."""
    pushed: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(_PUSHED, 0)))
    in_work: int = 0

    def add(self, other: Counts) -> None:
        """Count what another worker counted, too."""
        self.answers.update(other.answers)
        for route, counts in other.in_bucket.items():
            own = self.in_bucket.get(route, [0] * len(counts))
            self.in_bucket[route] = [one + more for one, more in zip(own, counts, strict=True)]
        self.seconds.update(other.seconds)
        self.pushed.update(other.pushed)
        self.in_work += other.in_work

    def to_json(self) -> str:
        """For the file that other workers read."""
        answers = [[route, status, count] for (route, status), count in self.answers.items()]
        return json.dumps({**vars(self), "answers": answers})

    @classmethod
    def from_json(cls, text: str) -> Counts:
        """Raises ValueError, KeyError or TypeError on anything else."""
        raw = json.loads(text)
        return cls(
            answers=Counter({(route, status): count for route, status, count in raw["answers"]}),
            in_bucket=raw["in_bucket"],
            seconds=Counter(raw["seconds"]),
            pushed=Counter(raw["pushed"]),
            in_work=raw["in_work"],
        )


class Metrics:
    """Of one application; several may be in one process."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()
        self._in_work: Callable[[], int] = lambda: 0

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer; routes are few, since they are templates and not what was asked for."""
        with self._lock:
            self._counts.answers[route, status] += 1
            buckets = self._counts.in_bucket.setdefault(route, [0] * (len(_BUCKETS) + 1))
            buckets[bisect_left(_BUCKETS, seconds)] += 1
            self._counts.seconds[route] += seconds  # type: ignore[assignment]  # a Counter counts floats too

    def pushed(self, what: str, count: int = 1) -> None:
        """Count behaviors, impressions, clicks or rows of features that were taken in."""
        with self._lock:
            self._counts.pushed[what] += count

    def watch(self, in_work: Callable[[], int]) -> None:
        """Ask this for the requests in work, whenever somebody looks."""
        self._in_work = in_work

    def counts(self) -> Counts:
        """A copy of what was counted, with the requests in work now."""
        with self._lock:
            total = Counts(in_work=self._in_work())
            total.add(self._counts)
        return total

    def text(
        self, live: tuple[str, Mapping[str, float]] | None = None, others: Iterable[Counts] = ()
    ) -> str:
        """Prometheus's text format, what `others` counted added; with the model that answers, and the age
        of each view that it reads."""
        total = self.counts()
        for other in others:
            total.add(other)
        lines = list(_lines(total))
        if live is not None:
            model_version, freshness = live
            lines += _head("bahe_live_model", "gauge", "1 for the model that answers.")
            lines.append(f'bahe_live_model{{model_version="{_escaped(model_version)}"}} 1')
            about = "Since a view that the model reads was last written online by a publish."
            lines += _head("bahe_feature_freshness_seconds", "gauge", about)
            for view, seconds in freshness.items():
                lines.append(f'bahe_feature_freshness_seconds{{view="{_escaped(view)}"}} {seconds:.3f}')
        return "\n".join([*lines, ""])


def _lines(counts: Counts) -> Iterator[str]:
    yield from _head("bahe_requests_total", "counter", "Answers; 499 are clients that went away.")
    for (route, status), count in sorted(counts.answers.items()):
        yield f'bahe_requests_total{{route="{_escaped(route)}",status="{status}"}} {count}'
    yield from _head("bahe_request_seconds", "histogram", "From a request's head to its answer's end.")
    for route, buckets in sorted(counts.in_bucket.items()):
        label = f'route="{_escaped(route)}"'
        totals = list(accumulate(buckets))
        for bound, total in zip((*map(str, _BUCKETS), "+Inf"), totals, strict=True):
            yield f'bahe_request_seconds_bucket{{{label},le="{bound}"}} {total}'
        yield f"bahe_request_seconds_sum{{{label}}} {counts.seconds[route]}"
        yield f"bahe_request_seconds_count{{{label}}} {totals[-1]}"
    yield from _head("bahe_requests_in_work", "gauge", "Requests that have a thread or wait for one.")
    yield f"bahe_requests_in_work {counts.in_work}"
    for what, count in counts.pushed.items():
        yield from _head(f"bahe_{what}_pushed_total", "counter", f"{what.capitalize()} that were taken in.")
        yield f"bahe_{what}_pushed_total {count}"


def _head(name: str, kind: str, about: str) -> tuple[str, str]:
    return f"# HELP {name} {about}", f"# TYPE {name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
