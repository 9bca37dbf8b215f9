"""A project: the home folder of one dataset, and every job as a method.

The command line calls these methods and prints what they return; a notebook or a scheduler calls the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import date as Date
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bahe.online import Online
from bahe_core.home import Home
from bahe_core.machine import configure_threads, is_first_process
from bahe_core.progress import job, say
from bahe_core.results import Result

if TYPE_CHECKING:
    import duckdb
    from feast import FeatureStore

    from bahe.daily import Day, Retrain
    from bahe.run import PipelineRun
    from bahe.status import Status
    from bahe_lake.runs import Run
    from materialize.executors import ExecutorConfig
    from materialize.frames.frame import Frame
    from materialize.ingest.check import Checked
    from materialize.ingest.ingest import Ingested
    from materialize.ingest.quarantine import Held
    from materialize.release.publish import Published
    from materialize.training.comparison import Comparison
    from materialize.training.refit import Refitted
    from materialize.training.tracking import Tracker
    from materialize.training.train import TrainingOutcome
    from materialize.upkeep.compact import Compacted
    from materialize.upkeep.prune import Pruned
    from materialize.vectors.embed import Embedded
    from materialize.vectors.encode import Encoded
    from materialize.vectors.stored_atoms import Atoms
    from serving.audit.audit_result import Audit

Done = TypeVar("Done", bound=Result)


def open(home: Path | str | None = None) -> Project:
    """The project in a home folder: the one named, else BAHE_HOME, else `.bahe` here.

    Nothing is created before the first job writes. Heavy libraries are loaded by the jobs that need them.
    """
    configure_threads()
    return Project(Home.at(home))


def check(dataset: Path | str) -> Checked:
    """Look for everything that is wrong with a dataset.yaml, its files and columns, without reading a row.

    Raises BadInput with all problems at once, each with its line.
    """
    from materialize.ingest.check import check

    return check(Path(dataset))


class Project(Online):
    """Every job on one home. Each does only what is new, so calling it twice costs nothing, passes its own
    gate, and returns what it did.

    All raise `BaheError`: `BadInput` on wrong data or options (nothing was written), `NotReady` when a job
    that comes before is missing, `GateFailed`, `Busy` while another process writes to the home.
    """

    def __init__(self, home: Home) -> None:
        self.home = home

    def __repr__(self) -> str:
        return f"bahe.open({str(self.home.root)!r})"

    # ---- from the log to online scores, in this order

    def ingest(self, dataset: Path | str) -> Ingested:
        """Read what is new of the log that a dataset.yaml describes: atoms, timelines, statistics."""
        from materialize.ingest.ingest import ingest

        with job("ingest"):
            return ingest(self.home, Path(dataset))

    def quarantine(self, table: str | None = None, *, examples: int = 1) -> list[Held]:
        """The rows that `ingest` set aside, grouped by table and reason, with this many examples each."""
        from materialize.ingest.quarantine import quarantined

        return quarantined(self.home, table=table, examples=examples)

    def encode(
        self,
        *,
        device: str | None = None,
        processes: int | None = None,
        compile: bool = False,
        executor: ExecutorConfig | None = None,
    ) -> Encoded:
        """Encode the atoms that have no vector yet with the frozen shallow layers.

        `processes` is one for each visible GPU by default, else one; `compile` fuses operations by
        torch.compile first; `executor` runs it on a Ray cluster.
        """
        from materialize.executors import LOCAL
        from materialize.vectors.encode import encode

        with job("encode"):
            return encode(
                self.home,
                device_name=device,
                processes=processes,
                compile=compile,
                where=executor or LOCAL,
            )

    def apply(self, target: str | None = None) -> str:
        """Register entities, views and services with Feast; returns how many, in words.

        `target` says where online values lie from now on: sqlite, redis, postgres, or a file of settings.
        """
        from bahe.registration import register

        with job("apply"):
            registered = register(self.home, target)
            say(f"  registered {registered}")
        return registered

    def frame(
        self,
        *,
        service: str = "ctr_training",
        as_of: int | None = None,
        executor: ExecutorConfig | None = None,
    ) -> Frame:
        """Pull the point-in-time training frame and split it by time; `as_of` is a snapshot of the lake."""
        from materialize.executors import LOCAL
        from materialize.frames.frame import frame

        with job("frame"):
            return frame(self.home, service=service, as_of=as_of, where=executor or LOCAL)

    def train(
        self,
        *,
        device: str | None = None,
        tracker: Tracker = "mlflow",
        warm_start: str | None = None,
        shard: bool = False,
    ) -> TrainingOutcome:
        """Train BAHE, the ID-only network and the floor on the last frame.

        A killed run goes on where it stopped. `warm_start` is a model_version to start from; `shard`, under
        torchrun, gives each process a share of the deep layers.
        """
        from materialize.training.train import train_models

        with job("train"):
            done = train_models(
                self.home, device_name=device, tracker=tracker, warm_start=warm_start, shard=shard
            )
            if is_first_process():
                _say(done, model_version=done.model_version, results=done.results)
        return done

    def refit(
        self, *, model_version: str | None = None, warm_start: str | None = None, device: str | None = None
    ) -> Refitted:
        """Train a measured model (the last one) once more on every impression, as many epochs as its best.

        Embed and publish the result by its name; the measured model stays beside it.
        """
        from materialize.training.refit import refit

        with job("refit"):
            return _say(
                refit(self.home, model_version=model_version, warm_start=warm_start, device_name=device)
            )

    def compare(
        self,
        dataset: Path | str | None = None,
        *,
        models: Sequence[str] | None = None,
        variants: Sequence[str] = (),
        seeds: int = 3,
        test: bool = False,
        device: str | None = None,
    ) -> Comparison:
        """Train BAHE and its peers on one frame with several seeds; is one better, beyond chance?

        On the last frame, or that of a `dataset`, which is ingested first. `models` are names as `bahe
        compare` has them; each of `variants` is BAHE with other settings, as `model.deep=true`. `test` adds
        the test split. Killed, it goes on where it stopped.
        """
        from bahe.run import to_frame
        from materialize.training.compare import check_asked, compare

        if dataset is not None:
            check_asked(Path(dataset), models, variants, seeds)
            to_frame(self, Path(dataset), device=device)
        with job("compare"):
            done = compare(
                self.home, models=models, variants=variants, seeds=seeds, test=test, device_name=device
            )
            return _say(done)

    def embed(
        self,
        *,
        model_version: str | None = None,
        device: str | None = None,
        executor: ExecutorConfig | None = None,
    ) -> Embedded:
        """Compute user and item vectors of a model (the last trained one) where they changed."""
        from materialize.executors import LOCAL
        from materialize.vectors.embed import embed

        with job("embed"):
            return embed(
                self.home, model_version=model_version, device_name=device, where=executor or LOCAL
            )

    def publish(self) -> Published:
        """Write what is new to the online store, check it, and make the embedded model the live one."""
        from materialize.release.publish import publish

        with job("publish"):
            return _say(publish(self.home))

    def rollback(self, to: str | None = None) -> Published:
        """Make the version that was live before (or the one named) live again, at once."""
        from materialize.release.publish import rollback

        with job("publish"):
            return _say(rollback(self.home, to))

    # ---- all of it

    def run(
        self, dataset: Path | str, *, device: str | None = None, tracker: Tracker = "mlflow"
    ) -> PipelineRun:
        """Every job from the log to online scores.

        Ends after training when the model can only be used offline (`model.head: target`).
        """
        from bahe.run import run

        return run(self, Path(dataset), device=device, tracker=tracker)

    def daily(
        self,
        dataset: Path | str | None = None,
        *,
        date: Date | None = None,
        retrain: Retrain = "warm",
        tolerance: float = 0.005,
        wait: float = 0,
        refit: bool = True,
        device: str | None = None,
        tracker: Tracker = "mlflow",
    ) -> Day:
        """One night: what `run` does, with a quality gate before a new model goes live.

        `dataset` is the last night's when left out, `date` today in UTC. `retrain`: train on from the live
        model (`warm`), anew (`fresh`), or keep it and refresh its vectors (`never`). `tolerance` is how far
        the new model's AUC may lie below the live one's, on impressions that neither was chosen by; `wait`
        the seconds to wait for another job on this home to end. With `refit` a model that passes is trained
        once more on every impression before it is published. Killed anywhere, the same call goes on with
        the step that was not finished.
        """
        from bahe.run import daily

        return daily(
            self,
            None if dataset is None else Path(dataset),
            date=date,
            retrain=retrain,
            tolerance=tolerance,
            wait=wait,
            refit=refit,
            device=device,
            tracker=tracker,
        )

    # ---- what there is, and its upkeep

    def status(self) -> Status:
        """Which parts of the home are stale, and the command that helps. Loads no model."""
        from bahe.status import status

        return status(self.home)

    def runs(self, job: str | None = None, limit: int | None = 20) -> list[Run]:
        """Finished runs, the newest first: of one job (`embed`, `gate embed`), or of all."""
        from bahe_lake.connection import lake
        from bahe_lake.runs import history

        with lake(self.home) as connection:
            return history(connection, job, limit)

    def compact(self, *, keep_days: float = 90) -> Compacted:
        """Merge the lake's small files and forget snapshots older than this many days."""
        from materialize.upkeep.compact import compact

        with job("compact"):
            return _say(compact(self.home, keep_days=keep_days))

    def prune(self, *, keep: int = 3, older_than: float | None = None, dry_run: bool = False) -> Pruned:
        """Drop all but the newest `keep` models, with their vectors and frames.

        Of these, `older_than` drops what was trained more days ago; `dry_run` only says what would go.
        """
        from materialize.upkeep.prune import prune

        with job("prune"):
            return _say(prune(self.home, keep=keep, older_than=older_than, dry_run=dry_run))

    # ---- for models of your own

    def feature_store(self) -> FeatureStore:
        """The home's Feast store: `get_historical_features`, `get_online_features` and all the rest."""
        from feature_repo.store import open_store

        return open_store(self.home)

    def lake(self, *, as_of: int | None = None) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """A DuckDB connection with the lake attached, for SQL; `as_of` is a snapshot of the lake.

        A context manager: `with project.lake() as connection`. One connection per thread.
        """
        from bahe_lake.connection import lake

        return lake(self.home, as_of=as_of)

    def atoms(self, encoder_version: str | None = None) -> Atoms:
        """Ids and vectors of all atoms, as the last `encode` (or the encoder named) made them."""
        from materialize.vectors.stored_atoms import atoms_of

        return atoms_of(self.home, encoder_version)

    # ---- online, beside what `Online` has

    def audit(
        self, *, requests: bool = False, last: int = 10_000, sample: float = 1.0, device: str | None = None
    ) -> Audit:
        """Compare what is served with what training would have seen, feature by feature.

        `requests` takes the newest logged requests, `last` pairs of user and item; otherwise the pairs of
        the `last` impressions are asked about now. `sample` is the share of users to look at.
        """
        from serving.audit.audit import audit

        with job("audit"):
            return _say(audit(self.home, requests=requests, last=last, sample=sample, device_name=device))

    def serve(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        workers: int = 1,
        live: bool = False,
        log_requests: float = 0,
        timeout: float = 10.0,
        threads: int = 4,
        waiting: int = 32,
        tls_certificate: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        """Serve the live model over HTTP until interrupted; `live` also takes behaviors as they happen.

        In so many `workers` (processes), each with the model. `log_requests` is the share of users whose
        requests are kept for `audit`. A request has `timeout` seconds to arrive, and as many for its
        answer; `threads` are worked on at once, `waiting` wait, more get 503. Once the home has an API key,
        every request needs one; a certificate and its key (PEM) make it HTTPS. Raises BadInput when others
        could ask (`host`) and there is none.
        """
        from serving.http.guards import Limits
        from serving.http.server import Address, serve
        from serving.http.tls import tls

        limits = Limits(seconds=timeout, threads=threads, waiting=waiting)
        where = Address(host, port, workers, tls(tls_certificate, tls_key))
        serve(self.home, where, live=live, log_requests=log_requests, limits=limits)

    def new_api_key(self, name: str, scopes: Sequence[str] = ("read", "score")) -> str:
        """Make a key for the service; only its hash is kept. Scopes are read, score and write."""
        from serving.http.keys import new_key

        return new_key(self.home, name, scopes)

    def revoke_api_key(self, name: str) -> None:
        """Forget a key; running services refuse it at once."""
        from serving.http.keys import revoke_key

        revoke_key(self.home, name)


def _say(done: Done, **facts: object) -> Done:
    """Say what a job did; the facts are for machines."""
    for line in done.summary:
        say(f"  {line}", **facts)
    return done
