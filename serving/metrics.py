"""What a service tells Prometheus of itself.

Written here, since Feast puts the process's prometheus_client into its multi-process mode, where two
services of one process, and services one after another, would add up.
https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds."""


_PUSHED = ("behaviors", "impressions", "clicks")


class Metrics:
    """Of one application; several may be in one process."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: Counter[tuple[str, int]] = Counter()
        self._in_bucket: dict[str, list[int]] = defaultdict(lambda: [0] * (len(_BUCKETS) + 1))
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._pushed: Counter[str] = Counter(dict.fromkeys(_PUSHED, 0))
        self._in_work: Callable[[], int] = lambda: 0

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer; routes are few, since they are templates and not what was asked for."""
        with self._lock:
            self._answers[route, status] += 1
            self._in_bucket[route][bisect_left(_BUCKETS, seconds)] += 1
            self._seconds[route] += seconds

    def pushed(self, what: str, count: int = 1) -> None:
        """Count behaviors, impressions or clicks that were taken in."""
        with self._lock:
            self._pushed[what] += count

    def watch(self, in_work: Callable[[], int]) -> None:
        """Ask this for the requests in work, whenever somebody looks."""
        self._in_work = in_work

    def text(self, live: tuple[str, Mapping[str, float]] | None = None) -> str:
        """Prometheus's text format; with the model that answers, and the age of each view that it reads."""
        with self._lock:
            lines = list(self._lines())
        if live is not None:
            model_version, freshness = live
            lines += _head("bahe_live_model", "gauge", "1 for the model that answers.")
            lines.append(f'bahe_live_model{{model_version="{_escaped(model_version)}"}} 1')
            about = "Since a view that the model reads was last written online by a publish."
            lines += _head("bahe_feature_freshness_seconds", "gauge", about)
            for view, seconds in freshness.items():
                lines.append(f'bahe_feature_freshness_seconds{{view="{_escaped(view)}"}} {seconds:.3f}')
        return "\n".join([*lines, ""])

    def _lines(self) -> Iterator[str]:
        yield from _head("bahe_requests_total", "counter", "Answers; 499 are clients that went away.")
        for (route, status), count in sorted(self._answers.items()):
            yield f'bahe_requests_total{{route="{_escaped(route)}",status="{status}"}} {count}'
        yield from _head("bahe_request_seconds", "histogram", "From a request's head to its answer's end.")
        for route, counts in sorted(self._in_bucket.items()):
            label = f'route="{_escaped(route)}"'
            totals = list(accumulate(counts))
            for bound, total in zip((*map(str, _BUCKETS), "+Inf"), totals, strict=True):
                yield f'bahe_request_seconds_bucket{{{label},le="{bound}"}} {total}'
            yield f"bahe_request_seconds_sum{{{label}}} {self._seconds[route]}"
            yield f"bahe_request_seconds_count{{{label}}} {totals[-1]}"
        yield from _head("bahe_requests_in_work", "gauge", "Requests that have a thread or wait for one.")
        yield f"bahe_requests_in_work {self._in_work()}"
        for what, count in self._pushed.items():
            yield from _head(
                f"bahe_{what}_pushed_total", "counter", f"{what.capitalize()} that were taken in."
            )
            yield f"bahe_{what}_pushed_total {count}"


def _head(name: str, kind: str, about: str) -> tuple[str, str]:
    return f"# HELP {name} {about}", f"# TYPE {name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
