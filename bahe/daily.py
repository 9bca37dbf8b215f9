"""One day of it: the jobs from the log to online scores as one run that can be killed and goes on.

What each step did is kept in `daily/DATE.json`, written whole after every change.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

from bahe_core.errors import BadInput, BaheError, Damaged, NotReady
from bahe_core.files import replace_atomically
from bahe_core.home import Home
from bahe_core.progress import job, say
from bahe_lake import runs
from bahe_lake.connection import lake
from bahe_lake.transactions import commit
from materialize.release import pointer

JOB = "daily"
Retrain = Literal["warm", "fresh", "never"]
STEPS = ("ingest", "encode", "apply", "frame", "train", "quality", "refit", "embed", "publish")
"""In this order."""
OF_TRAINING = ("frame", "train", "quality", "refit")
"""Left out where the live model is only refreshed."""


@dataclass(kw_only=True)
class StepFacts:
    """What one step did."""

    state: Literal["running", "done", "failed"]
    started: str
    finished: str | None = None
    seconds: float | None = None
    unchanged: bool = False
    """There was nothing new to do."""
    reason: str | None = None
    """Why it failed."""
    snapshot: int | None = None
    """Of the lake, as the step found it."""
    rows_read: int | None = None
    rows_written: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    gate: dict[str, Any] | None = None
    """The verdict on what it wrote: passed, checks, failures."""


@dataclass(kw_only=True)
class Day:
    """The manifest of one date."""

    date: str
    dataset: str
    retrain: Retrain
    started: str
    finished: str | None = None
    live_before: str | None = None
    """The model_version that was live when the run began: what a warm start starts from."""
    model_version: str | None = None
    """What is live after it."""
    steps: dict[str, StepFacts] = field(default_factory=dict)

    @property
    def trained(self) -> str | None:
        """The model_version that this run trained."""
        return self.steps["train"].versions.get("model_version") if "train" in self.steps else None

    @property
    def chosen(self) -> str | None:
        """The model_version to publish: the trained one, refitted where that was asked for, or the live."""
        refitted = self.steps["refit"].versions.get("model_version") if "refit" in self.steps else None
        return refitted or self.trained or self.live_before

    @property
    def stopped_at(self) -> str | None:
        """The step that was not finished; None where the day is done or nothing began."""
        return next((name for name, step in self.steps.items() if step.state != "done"), None)


Step = Callable[[Day], dict[str, str] | None]
"""Does the step; returns the versions it settled on where the table `runs` does not tell them."""


def today() -> date:
    """The date in UTC, as all of the log is."""
    return datetime.now(UTC).date()


def days(home: Home) -> list[Day]:
    """The manifests of all dates, the newest first. Raises Damaged when one cannot be read."""
    return [_read(path.stem, home) for path in sorted(home.days.glob("*.json"), reverse=True)]


def run_day(
    home: Home,
    when: date,
    dataset: str | None,
    retrain: Retrain,
    steps: Mapping[str, Step],
    *,
    wait: float = 0,
) -> Day:
    """Take the steps that this date's run has not finished, in the order of `STEPS`.

    Holds the home's lock from the first to the last, for which it waits so many seconds. Does nothing when
    this date or a later one is done. A changed `retrain`, and a rollback meanwhile, take the steps from
    training on again. Raises what a step raises, with the reason in the manifest; Busy; BadInput on a date
    to come.
    """
    if when > today() + timedelta(days=1):  # a clock ahead of UTC may be a day on
        raise BadInput(f"--date {when} lies in the future; give the day that the log ends with.")
    if wait and home.busy():
        say(f"  another bahe job is writing to {home.root}; waiting for up to {wait:g} s", wait=wait)
    with job(JOB), home.exclusive(wait):
        known = days(home)
        done = next((d for d in known if d.finished and d.date >= when.isoformat()), None)
        if done is not None:
            later = "" if done.date == when.isoformat() else f", and so is {when} with it"
            say(
                f"  {done.date} is done{later}; live: {done.model_version}",
                model_version=done.model_version,
            )
            return done
        day = _begin(home, when, dataset, retrain, known)
        for name in _wanted(day):
            if name not in day.steps or day.steps[name].state != "done":
                _take(home, day, name, steps[name])
        _finish(home, day)
        say(f"[bold]{day.date} is done[/bold]; live: {day.model_version}", model_version=day.model_version)
    return day


def trained_on_latest_frame(home: Home, model_version: str) -> bool:
    """Whether a model has seen all that the latest frame could teach it. Weights are not read."""
    from materialize.frames.frame import latest_frame

    try:
        config = json.loads((home.models / model_version / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(config.get("facts", {}).get("frame_id") == latest_frame(home).frame_id)


def _begin(home: Home, when: date, dataset: str | None, retrain: Retrain, known: list[Day]) -> Day:
    """This date's manifest, made where there is none."""
    dataset = dataset or next((d.dataset for d in known), None)
    if dataset is None:
        raise BadInput(
            f"no daily run of {home.root} is known yet; name its dataset.yaml: `bahe daily dataset.yaml`."
        )
    live = None
    with contextlib.suppress(NotReady), lake(home) as connection:  # nothing is there on the first day
        live = pointer.live(connection)
    day = next((d for d in known if d.date == when.isoformat()), None)
    if day is None:
        day = Day(date=when.isoformat(), dataset=dataset, retrain=retrain, started=_now(), live_before=live)
    else:
        published = "publish" in day.steps and day.steps["publish"].state == "done"
        rolled_back = not published and live not in (day.live_before, day.trained, day.chosen)
        if day.dataset != dataset:
            _forget_from("ingest", day)
        elif day.retrain != retrain or rolled_back:
            _forget_from("train", day)
        day.retrain, day.dataset = retrain, dataset
        day.live_before = live if rolled_back else day.live_before
    if day.retrain == "never" and day.live_before is None:
        raise NotReady(f"{home.root} has no live model to refresh; run `bahe daily --retrain fresh` first.")
    stopped = day.stopped_at
    if stopped is not None:
        say(f"  {day.date} goes on with {stopped}", step=stopped)
    _write(home, day)
    return day


def _forget_from(first: str, day: Day) -> None:
    """Let a step and those after it be taken again."""
    day.steps = {name: step for name, step in day.steps.items() if STEPS.index(name) < STEPS.index(first)}


def _finish(home: Home, day: Day) -> None:
    with lake(home) as connection:
        day.model_version = pointer.live(connection)
        last = runs.last(connection, JOB)
        if last is None or last.fingerprint != day.date:
            facts = {"date": day.date, "retrain": day.retrain, "model_version": day.model_version}
            with runs.record(connection, JOB, day.date) as now:
                run = runs.PendingRun(JOB, day.date, datetime.fromisoformat(day.started), now.snapshot_read)
                commit(connection, [run.statement(facts)])
    day.finished = _now()
    _write(home, day)


def _wanted(day: Day) -> list[str]:
    left_out = OF_TRAINING if day.retrain == "never" else ()
    return [name for name in STEPS if name not in left_out]


def _take(home: Home, day: Day, name: str, step: Step) -> None:
    """One step, with what it did in the manifest. Raises what it raises."""
    facts = StepFacts(state="running", started=_now())
    day.steps[name] = facts
    _write(home, day)
    start = time.monotonic()
    with job(name):
        say(f"[bold]{day.date}: bahe {name}[/bold]", date=day.date, state="started")
        try:
            settled = step(day)
        except BaseException as error:
            facts.state, facts.reason = "failed", _reason(error)
            with contextlib.suppress(Exception):  # the error that counts is the one at hand
                _add_record(home, day, name, facts)
            raise
        else:
            facts.state = "done"
            _add_record(home, day, name, facts)
            facts.versions = settled or facts.versions
        finally:
            facts.finished, facts.seconds = _now(), round(time.monotonic() - start, 2)
            _write(home, day)
        more = {"rows_read": facts.rows_read, "rows_written": facts.rows_written, **facts.versions}
        say(f"  [dim]{facts.seconds:.1f} s[/dim]", state="done", seconds=facts.seconds, **more)


def _reason(error: BaseException) -> str:
    if isinstance(error, BaheError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return repr(error)  # of other errors the kind says more than the message


def _add_record(home: Home, day: Day, name: str, facts: StepFacts) -> None:
    """Complete a step's facts from the table `runs`."""
    with lake(home) as connection:
        latest = runs.latest(connection)
    last, verdict = latest.get(name), latest.get(f"gate {name}")
    if last is not None:
        facts.unchanged = last.finished < datetime.fromisoformat(facts.started)
        facts.snapshot, facts.versions = last.snapshot_read, last.versions
        if not facts.unchanged:
            facts.rows_read, facts.rows_written = last.rows_read, last.rows_written
    if name == "quality" and verdict is not None:
        compared = [verdict.facts[key] for key in ("model_version", "live_version")]
        verdict = verdict if compared == [day.trained, day.live_before] else None
    if verdict is not None:
        facts.gate = {k: verdict.facts[k] for k in ("passed", "checks", "failures")}


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _read(when: str, home: Home) -> Day:
    path = home.days / f"{when}.json"
    try:
        raw = json.loads(path.read_text())
        return Day(**{**raw, "steps": {name: StepFacts(**step) for name, step in raw["steps"].items()}})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"the manifest {path} cannot be read ({error}); delete it and run again.") from None


def _write(home: Home, day: Day) -> None:
    with replace_atomically(home.days / f"{day.date}.json") as part:
        part.write_text(json.dumps(asdict(day), indent=2) + "\n")
