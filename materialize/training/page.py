"""An HTML page that needs no other file and no network, as the reports are."""

from __future__ import annotations

from html import escape
from pathlib import Path

from bahe_core.files import replace_atomically

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 3rem auto;
   padding: 0 1rem; color: #1b1f24; }}
 h2 {{ margin-top: 2.5rem; }}
 table {{ border-collapse: collapse; width: 100%; margin: 1.5rem 0; }}
 th, td {{ padding: .45rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right; }}
 th {{ vertical-align: bottom; }} td {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
 td span {{ color: #57606a; font-size: .85em; font-weight: 400; }}
 table.results :is(th, td):nth-child(-n+2), table.segments :is(th, td):first-child {{ text-align: left; }}
 table.segments td:first-child {{ white-space: normal; }}
 tr.best td {{ font-weight: 600; background: #eef6ff; }}
 .quiet {{ color: #57606a; }} svg {{ width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write_page(path: Path, title: str, body: str) -> None:
    """Write the page, whole or not at all; `title` is text, `body` is HTML."""
    with replace_atomically(path) as part:
        part.write_text(_PAGE.format(title=escape(title), body=body), encoding="utf-8")
