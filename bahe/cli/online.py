"""Commands that ask the live model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import bahe
from bahe.cli.options import (
    AtOption,
    ContextOption,
    DeviceOption,
    HomeOption,
    JsonFlag,
    UserOption,
)
from bahe.cli.printing import print_answer, print_audit, print_similar, print_table
from bahe.cli.program import app
from bahe_core.progress import say

DIFFERS = 3
"""Exit code of an audit that found differences."""


@app.command()
def lookup(user: UserOption, home: HomeOption = None, as_json: JsonFlag = False) -> None:
    """Show what the online store holds of a user under the live model."""
    user_features = bahe.open(home).lookup(user)
    facts: dict[str, Any] = {
        "user_id": user_features.user_id,
        "model_version": user_features.model_version,
        "cold": user_features.cold,
        "behaviors": user_features.behaviors,
        **user_features.statistics,
    }
    vectors = {**user_features.vectors, "embedding": user_features.vector}
    if as_json:
        plain = {name: None if v is None else v.tolist() for name, v in vectors.items()}
        typer.echo(json.dumps({**facts, **plain}))
        return
    for name, vector in vectors.items():
        if vector is not None:
            start = " ".join(f"{value:+.3f}" for value in vector[:6])
            facts[name] = f"[{start} …] ({len(vector)} numbers)"
    print_table(("feature", "value"), [(k, "" if v is None else str(v)) for k, v in facts.items()])


@app.command()
def score(
    user: UserOption,
    items: Annotated[list[str], typer.Option("--items", help="Item ids, separated by commas.")],
    home: HomeOption = None,
    at: AtOption = None,
    context: ContextOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Click probabilities of some items for a user, best first."""
    from serving.lookup.context import parsed_context

    candidates = [part.strip() for given in items for part in given.split(",") if part.strip()]
    answer = bahe.open(home).score(user, candidates, at=at, context=parsed_context(context or ()))
    print_answer(answer, as_json)


@app.command()
def recommend(
    user: UserOption,
    k: Annotated[int, typer.Option("-k", help="How many items.")] = 10,
    home: HomeOption = None,
    at: AtOption = None,
    context: ContextOption = None,
    include_seen: Annotated[bool, typer.Option(help="Also items the user has acted on before.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """The k items that the user will most likely click."""
    from serving.lookup.context import parsed_context

    answer = bahe.open(home).recommend(
        user, k, at=at, include_seen=include_seen, context=parsed_context(context or ())
    )
    print_answer(answer, as_json)


@app.command()
def similar(
    item: Annotated[str | None, typer.Option(help="Id of an item of the log: items like it.")] = None,
    user: Annotated[str | None, typer.Option(help="Id of a user of the log: users like them.")] = None,
    atom: Annotated[
        int | None, typer.Option(help="Id of an atomic behavior: behaviors whose texts are like its text.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Any text: items and behaviors of texts like it. Loads the language model."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many of each.")] = 10,
    home: HomeOption = None,
    as_json: JsonFlag = False,
) -> None:
    """What is most alike to an item, a user, an atomic behavior or a text, to the live model."""
    project = bahe.open(home)
    given = (item, user, atom, text)
    if sum(one is not None for one in given) != 1:
        raise bahe.BadInput("give one of --item, --user, --atom and --text.")
    found: bahe.SimilarItems | bahe.SimilarUsers | bahe.SimilarAtoms | bahe.SimilarToText
    if item is not None:
        found = project.similar_items(item, k)
    elif user is not None:
        found = project.similar_users(user, k)
    elif atom is not None:
        found = project.similar_atoms(atom, k)
    else:
        assert text is not None
        found = project.similar_to_text(text, k)
    print_similar(found, as_json)


@app.command()
def audit(
    home: HomeOption = None,
    requests: Annotated[
        bool, typer.Option("--requests", help="Logged requests, instead of asking about impressions.")
    ] = False,
    last: Annotated[int, typer.Option(min=1, help="How many pairs of user and item, the newest.")] = 10_000,
    sample: Annotated[
        float, typer.Option(help="Share of users to look at, above 0 and at most 1, by a hash of their id.")
    ] = 1.0,
    tolerance: Annotated[
        float, typer.Option(help="Share of rows of a feature that may differ before the exit code is 3.")
    ] = 0.0,
    device: DeviceOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare what is served with what training would have seen, and name the likely cause.

    Without --requests the online store is asked now, about the users and items of the newest impressions.
    With it, the requests that `bahe serve --log-requests SHARE` kept are looked at, each as of its moment.
    Offline values are computed anew: statistics by the point-in-time join, vectors by the model. Exits with
    3 where they differ.
    """
    found = bahe.open(home).audit(requests=requests, last=last, sample=sample, device=device)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), default=str))
    else:
        print_audit(found)
    if any(1 - feature.equal > tolerance for feature in found.features):
        raise typer.Exit(DIFFERS)


@app.command()
def serve(
    home: HomeOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; for other machines to ask, make an API key first.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that share the port; each has the model in memory.")
    ] = 1,
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Also take in /v1/behaviors, /v1/impressions and /v1/clicks, and answer /v1/similar/text;"
            " loads the language model.",
        ),
    ] = False,
    log_requests: Annotated[
        float,
        typer.Option(
            "--log-requests", help="Share of users, 0 to 1, whose requests are kept for `bahe audit`."
        ),
    ] = 0,
    timeout: Annotated[
        float, typer.Option(help="Seconds for a request to arrive, and again to be answered.")
    ] = 10.0,
    threads: Annotated[int, typer.Option(min=1, help="Requests that a worker works on at once.")] = 4,
    waiting: Annotated[
        int, typer.Option(min=0, help="Requests of each worker that wait; more get 503 at once.")
    ] = 32,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(help="Serve HTTPS with this certificate and those up to its authority (PEM)."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="The certificate's key (PEM), without a passphrase.")
    ] = None,
) -> None:
    """Serve the live model over HTTP: /v1/score, /v1/recommend, /v1/features, and /docs with all routes."""
    say(f"  http{'s' if tls_certificate else ''}://{host}:{port}/docs")
    bahe.open(home).serve(
        host=host,
        port=port,
        workers=workers,
        live=live,
        log_requests=log_requests,
        timeout=timeout,
        threads=threads,
        waiting=waiting,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
    )


@app.command("api-key")
def api_key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    home: HomeOption = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="read: features; score: scores and recommendations; write: pushing behaviors. May be"
            " repeated.",
            show_default="read and score",
        ),
    ] = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="Forget the key instead.")] = False,
) -> None:
    """Make a key for the service and print it, this once: only its hash is kept."""
    project = bahe.open(home)
    if revoke:
        project.revoke_api_key(name)
        return
    typer.echo(project.new_api_key(name, scope or ("read", "score")))
