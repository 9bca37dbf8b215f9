"""Logs behind URLs: an S3 server and an HTTP server that run in this process."""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from bahe_core.errors import BadInput
from bahe_core.home import Home
from materialize.ingest.ingest import ingest
from tests.support.logs import small_log, write_dataset


def test_s3_globs_are_read_file_by_file(bucket: object, tmp_path: Path, home: Home) -> None:
    log = small_log(rows=300)
    path = write_dataset(tmp_path / "log", log)
    sections = yaml.safe_load(path.read_text())
    sections["behaviors"] = {"files": "s3://shop/behaviors/*.parquet"}
    path.write_text(yaml.safe_dump(sections))
    with pytest.raises(BadInput, match=r"nothing matches s3://shop/behaviors/\*.parquet; correct it"):
        ingest(home, path)

    def put(day: int, low: int, high: int) -> None:
        file = tmp_path / "day.parquet"
        log["behaviors"].iloc[low:high].to_parquet(file)
        bucket.upload_file(str(file), "shop", f"behaviors/{day}.parquet")  # type: ignore[attr-defined]

    put(0, 0, 100)
    assert ingest(home, path).added["behaviors"] == 100
    assert ingest(home, path).skipped
    put(1, 90, 300)
    done = ingest(home, path)
    assert (done.added["behaviors"], done.duplicates) == (200, {"behaviors": 10})
    sections["behaviors"] = {"files": "gopher://shop/behaviors"}
    path.write_text(yaml.safe_dump(sections))
    with pytest.raises(BadInput, match=r"gopher:// is not read; use s3://"):
        ingest(home, path)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_a_file_behind_http(tmp_path: Path, home: Home) -> None:
    path = write_dataset(tmp_path / "log", small_log(rows=300))
    (tmp_path / "log" / "items.parquet").rename(tmp_path / "items.parquet")
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        sections = yaml.safe_load(path.read_text())
        sections["items"] = {"files": f"{address}/items.parquet"}
        path.write_text(yaml.safe_dump(sections))
        assert ingest(home, path).added["items"] == 25
        assert ingest(home, path).skipped
        sections["items"] = {"files": f"{address}/none.parquet"}
        path.write_text(yaml.safe_dump(sections))
        with pytest.raises(BadInput, match=r"items.files: .*/none.parquet cannot be read"):
            ingest(home, path)
        sections["items"] = {"files": f"{address}/*.parquet"}
        path.write_text(yaml.safe_dump(sections))
        with pytest.raises(BadInput, match=r"cannot be searched by a pattern; name one file"):
            ingest(home, path)
        server.shutdown()
