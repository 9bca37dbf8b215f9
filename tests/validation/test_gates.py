"""Each gate passes good tables, and names the column when any one rule is broken."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest

from bahe_core.errors import BaheError, GateFailed, NotReady
from bahe_lake.sql import sql_identifier, sql_literal
from validation import GateResult, require, run_gate
from validation.measure import measure

TABLES = {
    "behaviors": "lake.main.behaviors",
    "impressions": "lake.main.impressions",
    "items": "lake.main.items",
    "atoms": "lake.main.atoms",
    "user_timeline": "lake.main.user_timeline",
    "user_stats": "lake.main.user_stats",
    "ingested": "lake.main.ingested",
    "item_stats": "lake.main.item_stats",
    "frame": "(SELECT * FROM lake.main.frame)",
    "atomic_behavior_embedding": "lake.main.atomic_behavior_embedding",
    "user_embedding": "lake.main.user_embedding",
    "item_embedding": "lake.main.item_embedding",
}
CHANNELS = ["watched", "searched"]
PARAMETERS: dict[str, dict[str, Any]] = {
    "ingest": {"channels": CHANNELS, "latest": datetime(2030, 1, 1, tzinfo=UTC), "max_share": 0.001},
    "encode": {"encoder_version": "e1", "width": 3},
    "frame": {"channels": CHANNELS, "rows": 12},
    "embed": {"model_version": "m1", "width": 3, "users": 2, "items": 3},
}

# Two users, three items. Impressions come in pairs at one instant, so that ties are exercised.
GOOD = """
USE lake;
CREATE TABLE ingested AS FROM (VALUES ('impressions', 5000, 5)) t(table_name, read, broken);
CREATE TABLE atoms AS SELECT i::BIGINT AS atom_id, c AS channel, 'title $' || i AS text,
    TIMESTAMPTZ '2020-01-01 00:00:00+00' AS first_seen
    FROM (VALUES (1, 'watched'), (2, 'watched'), (3, 'searched'),
                 (4, 'item'), (5, 'item'), (6, 'item')) t(i, c);
CREATE TABLE items AS SELECT i::BIGINT AS item_id, (i + 3)::BIGINT AS atom_id, 'title' AS text,
    TIMESTAMPTZ '2020-01-01 00:00:00+00' AS event_timestamp FROM range(1, 4) t(i);
CREATE TABLE behaviors AS SELECT 'u' || (i % 2) AS user_id,
    CASE WHEN i % 3 = 0 THEN 'searched' ELSE 'watched' END AS channel,
    CASE WHEN i % 3 = 0 THEN 3 ELSE 1 + i % 2 END::BIGINT AS atom_id,
    TIMESTAMPTZ '2020-01-02 00:00:00+00' + to_hours(i::BIGINT) AS event_timestamp,
    NULL::BIGINT AS item_id FROM range(10) t(i);
CREATE TABLE impressions AS SELECT 'i' || i AS impression_id, 'u' || (i // 2 % 2) AS user_id,
    (1 + i % 3)::BIGINT AS item_id,
    TIMESTAMPTZ '2020-01-02 00:00:00+00' + to_hours((i // 2 * 2)::BIGINT) AS event_timestamp,
    (i % 2)::INTEGER AS clicked FROM range(12) t(i);
CREATE TABLE user_timeline AS SELECT user_id, channel,
    row_number() OVER (PARTITION BY user_id, channel ORDER BY event_timestamp) - 1 AS position,
    atom_id, event_timestamp FROM behaviors;
CREATE TABLE user_stats AS SELECT user_id, event_timestamp,
    sum(count(*)) OVER w AS user_impressions, sum(sum(clicked)) OVER w AS user_clicks,
    0.4 AS user_click_rate FROM impressions GROUP BY user_id, event_timestamp
    WINDOW w AS (PARTITION BY user_id ORDER BY event_timestamp);
CREATE TABLE item_stats AS SELECT item_id, event_timestamp,
    sum(count(*)) OVER v AS item_impressions, sum(sum(clicked)) OVER v AS item_clicks,
    0.4 AS item_click_rate FROM impressions GROUP BY item_id, event_timestamp
    WINDOW v AS (PARTITION BY item_id ORDER BY event_timestamp);
CREATE TABLE frame AS SELECT i.*,
    CASE WHEN hour(event_timestamp AT TIME ZONE 'UTC') < 6 THEN 'train'
         WHEN hour(event_timestamp AT TIME ZONE 'UTC') < 8 THEN 'validation'
         ELSE 'test' END AS split,
    (SELECT max(user_impressions) FROM user_stats s WHERE s.user_id = i.user_id
        AND s.event_timestamp < i.event_timestamp) AS user_impressions,
    (SELECT max(user_clicks) FROM user_stats s WHERE s.user_id = i.user_id
        AND s.event_timestamp < i.event_timestamp) AS user_clicks,
    (SELECT max(item_impressions) FROM item_stats s WHERE s.item_id = i.item_id
        AND s.event_timestamp < i.event_timestamp) AS item_impressions,
    (SELECT nullif(count(*), 0) FROM behaviors b WHERE b.user_id = i.user_id
        AND b.channel = 'watched' AND b.event_timestamp < i.event_timestamp) AS length_watched,
    (SELECT nullif(count(*), 0) FROM behaviors b WHERE b.user_id = i.user_id
        AND b.channel = 'searched' AND b.event_timestamp < i.event_timestamp) AS length_searched
    FROM impressions i;
CREATE TABLE atomic_behavior_embedding AS SELECT atom_id, 'e1' AS encoder_version,
    [atom_id, 1, 0.5]::FLOAT[] AS embedding, first_seen AS event_timestamp,
    first_seen AS created_timestamp FROM atoms;
-- A vector of another version is none of the gate's business, however broken.
INSERT INTO atomic_behavior_embedding VALUES (1, 'e0', ['nan']::FLOAT[], now(), now());
CREATE TABLE user_embedding AS SELECT DISTINCT user_id, 'm1' AS model_version,
    [ord(user_id[2]), 1, 0.5]::FLOAT[] AS embedding,
    TIMESTAMPTZ '2020-01-01 00:00:00+00' AS event_timestamp, now() AS created_timestamp FROM frame;
CREATE TABLE item_embedding AS SELECT item_id, 'm1' AS model_version,
    [item_id, 1, 0.5]::FLOAT[] AS embedding, event_timestamp, now() AS created_timestamp FROM items;
"""

# gate, the SQL that breaks a rule, and what the sentence must say.
BROKEN = [
    (
        "ingest",
        "UPDATE ingested SET broken = 6",
        "ingested.broken must be at most the share 0.001 of the rows read of a table, but 1 row breaks "
        "this rule, for example table_name impressions, broken 6, read 5000",
    ),
    (
        "ingest",
        "UPDATE behaviors SET user_id = NULL WHERE atom_id = 3",
        "behaviors.user_id must no",
    ),
    (
        "ingest",
        "UPDATE impressions SET event_timestamp = NULL WHERE impression_id = 'i7'",
        "impressions.event_timestamp must not be null, but 1 row breaks this rule, for example "
        "impression_id i7",
    ),
    (
        "ingest",
        "DELETE FROM item_stats",
        "item_stats.rows must not be empty, but 0 rows were found",
    ),
    (
        "ingest",
        "UPDATE impressions SET clicked = 5 WHERE impression_id IN ('i3', 'i4')",
        "impressions.clicked must be one of 0, 1, but 2 rows break this rule, for example "
        "impression_id i3, clicked 5",
    ),
    (
        "ingest",
        "UPDATE impressions SET clicked = 0",
        "impressions.clicked must be 1 in at least one",
    ),
    (
        "ingest",
        "UPDATE impressions SET impression_id = 'i1'",
        "impressions.impression_id must be uni",
    ),
    ("ingest", "UPDATE items SET item_id = 1", "items.event_timestamp must be unique"),
    ("ingest", "UPDATE atoms SET atom_id = 2 WHERE atom_id = 1", "atoms.atom_id must be unique"),
    (
        "ingest",
        "UPDATE atoms SET text = 'same' WHERE atom_id < 3",
        "atoms.text must belong to one atom per channel, but 1 row breaks this rule, for example "
        "channel watched, text same, copies 2",
    ),
    ("ingest", "UPDATE items SET text = '  ' WHERE item_id = 2", "items.text must not be blank"),
    ("ingest", "UPDATE behaviors SET channel = 'x'", "behaviors.channel must be one of watched"),
    (
        "ingest",
        "DELETE FROM atoms WHERE atom_id = 3",
        "behaviors.atom_id must exist in atoms, but 4 rows break this rule, for example atom_id 3",
    ),
    ("ingest", "DELETE FROM atoms WHERE atom_id = 4", "items.atom_id must exist in atoms"),
    ("ingest", "DELETE FROM items WHERE item_id = 1", "impressions.item_id must exist in items"),
    (
        "ingest",
        "UPDATE behaviors SET event_timestamp = to_timestamp(1580)",
        "behaviors.event_timestamp must lie between 1970-01-02 and 2030-01-01",
    ),
    (
        "ingest",
        "UPDATE items SET event_timestamp = TIMESTAMPTZ '2031-01-01 00:00:00+00'",
        "items.event_timestamp must lie between",
    ),
    (
        "ingest",
        "UPDATE user_stats SET user_clicks = 99",
        "user_stats.user_clicks must lie between 0",
    ),
    ("ingest", "UPDATE item_stats SET item_click_rate = 1", "item_stats.item_click_rate must lie"),
    (
        "ingest",
        "UPDATE item_stats SET item_click_rate = NULL",
        "item_stats.item_click_rate must lie",
    ),
    (
        "ingest",
        "UPDATE user_timeline SET position = position + 1",
        "user_timeline.position must run from 0 without a gap",
    ),
    (
        "ingest",
        "UPDATE user_timeline SET position = 0 WHERE position = 1",
        "user_timeline.position must be unique",
    ),
    (
        "ingest",
        "UPDATE user_timeline SET position = -position; "
        "UPDATE user_timeline SET position = position + "
        "(SELECT max(-position) FROM user_timeline t WHERE t.user_id = user_timeline.user_id "
        "AND t.channel = user_timeline.channel)",
        "user_timeline.event_timestamp must not fall as position grows",
    ),
    (
        "ingest",
        "DELETE FROM behaviors WHERE user_id = 'u1' AND channel = 'searched'",
        "user_timeline.rows must equal the rows of behaviors",
    ),
    ("ingest", "ALTER TABLE atoms DROP COLUMN text", "atoms.text must exist"),
    (
        "encode",
        "DELETE FROM atomic_behavior_embedding WHERE atom_id = 2",
        "atoms.atom_id must have a vector under this encoder_version, but 1 row breaks this rule, "
        "for example atom_id 2",
    ),
    (
        "encode",
        "INSERT INTO atomic_behavior_embedding SELECT * FROM atomic_behavior_embedding",
        "atomic_behavior_embedding.atom_id must appear once under this encoder_version",
    ),
    (
        "encode",
        "UPDATE atomic_behavior_embedding SET embedding = [1, 2] WHERE atom_id = 5",
        "atomic_behavior_embedding.embedding must hold 3 numbers, but 1 row breaks this rule, for "
        "example atom_id 5, len(embedding) 2",
    ),
    (
        "encode",
        "UPDATE atomic_behavior_embedding SET embedding = NULL",
        "embedding must hold 3 num",
    ),
    ("encode", "UPDATE atomic_behavior_embedding SET embedding = [1, 2, NULL]", "must hold 3 num"),
    (
        "encode",
        "UPDATE atomic_behavior_embedding SET embedding = ['nan', '1', '2']",
        "must be finite",
    ),
    (
        "encode",
        "UPDATE atomic_behavior_embedding SET embedding = ['1', '-inf', '2']",
        "must be finite",
    ),
    ("encode", "UPDATE atomic_behavior_embedding SET embedding = [0, -0.0, 0]", "a norm above 0"),
    (
        "encode",
        "UPDATE atomic_behavior_embedding SET embedding = [1, 2, 3]",
        "not be the same in e",
    ),
    ("frame", "DELETE FROM frame WHERE impression_id = 'i0'", "frame.rows must number exactly 12"),
    ("frame", "UPDATE frame SET impression_id = 'i1'", "frame.impression_id must be unique"),
    ("frame", "UPDATE frame SET clicked = NULL", "frame.clicked must not be null"),
    ("frame", "UPDATE frame SET clicked = 2", "frame.clicked must be one of 0, 1"),
    (
        "frame",
        "UPDATE frame SET clicked = 1 - clicked",
        "frame.impression_id must have the user, i",
    ),
    ("frame", "UPDATE frame SET split = 'dev'", "frame.split must be one of train, validation, te"),
    (
        "frame",
        "UPDATE frame SET split = 'train' WHERE split = 'test'",
        "frame.split must be test in",
    ),
    (
        "frame",
        "UPDATE frame SET split = 'train' WHERE impression_id = 'i11'",
        "frame.event_timestamp must not be later in train than the first row of validation",
    ),
    (
        "frame",
        "UPDATE frame SET split = 'validation' WHERE impression_id = 'i11'",
        "frame.event_timestamp must not be later in validation than the first row of test",
    ),
    (
        "frame",
        "UPDATE frame SET length_searched = -1",
        "frame.length_searched must be null or at le",
    ),
    (
        "frame",
        "UPDATE frame SET length_watched = length_watched + 1 WHERE impression_id = 'i9'",
        "frame.length_watched must count the behaviors strictly before the impression (sample of "
        "up to 2,000 rows), but 1 row breaks this rule, for example impression_id i9",
    ),
    (
        "frame",
        "UPDATE frame SET length_searched = NULL",
        "frame.length_searched must count the beha",
    ),
    (
        "frame",
        "UPDATE frame SET user_impressions = coalesce(user_impressions, 0) + 1",
        "frame.user_impressions must count the impressions strictly before the impression, but 12",
    ),
    (
        "frame",
        "UPDATE frame SET user_clicks = coalesce(user_clicks, 0) + clicked",
        "frame.user_clicks must count the clicks strictly before the impression, but 6 rows",
    ),
    (
        "frame",
        "UPDATE frame SET item_impressions = 7",
        "frame.item_impressions must count the impr",
    ),
    ("frame", "ALTER TABLE frame DROP COLUMN length_searched", "frame.length_searched must exist"),
    (
        "embed",
        "DELETE FROM user_embedding WHERE user_id = 'u0'",
        "user_embedding.rows must number e",
    ),
    (
        "embed",
        "UPDATE item_embedding SET item_id = 1",
        "item_embedding.item_id must appear once und",
    ),
    (
        "embed",
        "UPDATE item_embedding SET model_version = 'm0'",
        "item_embedding.rows must number ex",
    ),
    (
        "embed",
        "UPDATE user_embedding SET embedding = [1]",
        "user_embedding.embedding must hold 3 nu",
    ),
    (
        "embed",
        "UPDATE user_embedding SET embedding = ['inf', '0', '0']",
        "embedding must be finite",
    ),
    (
        "embed",
        "UPDATE user_embedding SET embedding = [1, 1, 1]",
        "user_embedding.embedding must not",
    ),
]


@pytest.fixture
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute("ATTACH ':memory:' AS lake")
        opened.execute(GOOD)
        yield opened


def run(connection: duckdb.DuckDBPyConnection, gate: str, docs: Path, **changes: Any) -> GateResult:
    parameters = {**PARAMETERS[gate], **changes}
    return run_gate(connection, gate, tables=TABLES, parameters=parameters, docs=docs)


@pytest.mark.parametrize("gate", list(PARAMETERS))
def test_good_tables_pass(
    connection: duckdb.DuckDBPyConnection,
    gate: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    result = run(connection, gate, tmp_path)
    require(result)
    assert result.passed
    assert result.failures == ()
    assert result.checks >= 10
    findings = measure(connection, gate, TABLES, PARAMETERS[gate])
    # A title names a check for Great Expectations: two of the same would hide one.
    assert len({finding.check.title for finding in findings}) == len(findings) == result.checks
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("gate", "damage", "sentence"), BROKEN)
def test_a_broken_rule_is_named(
    connection: duckdb.DuckDBPyConnection, gate: str, damage: str, sentence: str
) -> None:
    connection.execute(damage)
    findings = measure(connection, gate, TABLES, PARAMETERS[gate])
    broken = [finding.sentence for finding in findings if not finding.holds]
    assert any(sentence in line for line in broken), broken


@pytest.mark.parametrize(("gate", "damage", "sentence"), list({b[0]: b for b in BROKEN}.values()))
def test_great_expectations_refuses_what_was_found(
    connection: duckdb.DuckDBPyConnection, gate: str, damage: str, sentence: str, tmp_path: Path
) -> None:
    connection.execute(damage)
    findings = measure(connection, gate, TABLES, PARAMETERS[gate])
    result = run(connection, gate, tmp_path)
    assert not result.passed
    assert result.failures == tuple(f.sentence for f in findings if not f.holds)
    with pytest.raises(GateFailed, match=f"^The {gate} gate refused the hand-over: .*{sentence}"):
        require(result)


def test_a_channel_may_be_called_anything(connection: duckdb.DuckDBPyConnection) -> None:
    name = """it's "$frame" $x"""
    column = sql_identifier(f"length_{name}")
    connection.execute(f"UPDATE user_timeline SET channel = {sql_literal(name)} WHERE channel = 'searched'")
    connection.execute(f"ALTER TABLE frame RENAME length_searched TO {column}")
    findings = measure(connection, "frame", TABLES, {"channels": ["watched", name], "rows": 12})
    assert [finding.sentence for finding in findings if not finding.holds] == []
    connection.execute(f"UPDATE frame SET {column} = 99")
    findings = measure(connection, "frame", TABLES, {"channels": ["watched", name], "rows": 12})
    (broken,) = [finding for finding in findings if not finding.holds]
    assert broken.check.column == f"length_{name}"


def test_data_docs_keep_the_latest_result_of_each_gate(
    connection: duckdb.DuckDBPyConnection, tmp_path: Path
) -> None:
    run(connection, "encode", tmp_path)
    connection.execute("UPDATE impressions SET clicked = 5, impression_id = '<b>$x</b>' WHERE clicked = 1")
    failed = run(connection, "ingest", tmp_path)
    assert failed.docs == tmp_path / "gates.html"

    def page(name: str) -> str:
        (only,) = (tmp_path / "validations" / name).rglob("*.html")
        return only.read_text()

    assert "impressions.clicked must be one of 0, 1" in page("ingest/impressions")
    assert "FAILED: 6 rows break this rule, for example" in page("ingest/impressions")
    assert "FAILED" not in page("ingest/items")
    assert "none allowed" in page("encode/atoms")
    assert "&lt;b&gt;$x&lt;/b&gt;" in page("ingest/impressions")
    assert "<b>$x" not in page("ingest/impressions")


def test_docs_are_replaced_on_rerun(connection: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    for _ in range(2):
        run(connection, "embed", tmp_path)
    suites = sorted(page.parts[-4] for page in (tmp_path / "validations").rglob("*.html"))
    assert suites == ["item_embedding", "user_embedding"]
    assert "embed.user_embedding" in (tmp_path / "index.html").read_text()


def test_a_frame_is_read_from_parquet(connection: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    connection.execute(f"COPY frame TO '{tmp_path}/frame.parquet'")
    tables = {**TABLES, "frame": f"read_parquet('{tmp_path}/*.parquet')"}
    result = run_gate(
        connection, "frame", tables=tables, parameters=PARAMETERS["frame"], docs=tmp_path / "docs"
    )
    require(result)


def test_require_counts_the_rest(tmp_path: Path) -> None:
    result = GateResult("frame", False, 3, ("a.b must c.", "d.", "e."), tmp_path / "gates.html")
    with pytest.raises(BaheError) as caught:
        require(result)
    assert str(caught.value) == (
        f"The frame gate refused the hand-over: a.b must c (and 2 more); see {tmp_path}/gates.html."
    )


def test_what_cannot_be_read_is_said_in_one_sentence(
    connection: duckdb.DuckDBPyConnection, tmp_path: Path
) -> None:
    connection.execute("DROP TABLE user_embedding")
    with pytest.raises(NotReady, match=r"^The embed gate cannot read user_embedding at lake\.main"):
        run(connection, "embed", tmp_path)
    connection.execute("ALTER TABLE frame ALTER clicked TYPE VARCHAR")
    connection.execute("UPDATE frame SET clicked = 'yes'")
    with pytest.raises(GateFailed, match=r"^The frame gate cannot check frame\.") as caught:
        run(connection, "frame", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_caller_who_forgets_something_is_told(
    connection: duckdb.DuckDBPyConnection, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="also needs the tables atoms"):
        run_gate(
            connection,
            "encode",
            tables={"atomic_behavior_embedding": "x"},
            parameters=PARAMETERS["encode"],
            docs=tmp_path,
        )
    with pytest.raises(ValueError, match="no gate is called 'dream'"):
        run_gate(connection, "dream", tables=TABLES, parameters={}, docs=tmp_path)


def test_one_page_shows_every_check_of_every_gate_without_a_network(
    tmp_path: Path,
) -> None:
    from validation.checks import Check
    from validation.measure import Finding
    from validation.summary import write_summary

    def finding(rule: str, count: int) -> Finding:
        check = Check(table="t", column="c", rule=rule, source="t", counted="true", why="because")
        return Finding(check=check, count=count, outcome="1 row did, for example <b>")

    write_summary("ingest", [finding("must hold", 0)], [True], tmp_path)
    page = write_summary("embed", [finding("must not fail", 1)], [False], tmp_path).read_text()
    assert "passed, 1 checks" in page
    assert "1 of 1 checks failed" in page
    assert "1 row did, for example &lt;b&gt;" in page
    assert "http" not in page
