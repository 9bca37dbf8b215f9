"""The page at /docs: every route with its fields and a command to try, from the OpenAPI, without a script.

Swagger's page loads itself from the internet, which a server often may not reach.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 50rem; padding: 0 1rem; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
code { font-size: .9em; }
section { border-top: 1px solid #ccc; margin-top: 1.5rem; }
.old { color: #777; }
td, th { text-align: left; vertical-align: top; padding: .1rem .8rem .1rem 0; }
"""


def page(openapi: dict[str, Any], address: str) -> str:
    """HTML of the routes; `address` is where the service was asked."""
    sections = [
        _section(openapi, address, path, method, route)
        for path, methods in openapi["paths"].items()
        for method, route in methods.items()
    ]
    title = escape(openapi["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{escape(openapi['info'].get('summary', ''))} The same for programs:"
        f' <a href="openapi.json">openapi.json</a>.</p>{"".join(sections)}</body></html>'
    )


def _section(openapi: dict[str, Any], address: str, path: str, method: str, route: dict[str, Any]) -> str:
    body = _body_schema(openapi, route)
    fields = [(p["name"], p["schema"], p.get("required", False)) for p in route.get("parameters", ())]
    fields += [
        (name, schema, name in body.get("required", ()))
        for name, schema in body.get("properties", {}).items()
    ]
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{'required' if required else ''}</td>"
        f"<td>{escape(schema.get('description', ''))}</td></tr>"
        for name, schema, required in fields
    )
    old = ' class="old"' if route.get("deprecated") else ""
    return (
        f"<section{old}><h2><code>{method.upper()} {escape(path)}</code></h2>"
        f"<p>{escape(route.get('description', route.get('summary', '')))}</p>"
        + (f"<table>{rows}</table>" if rows else "")
        + f"<pre>{escape(_command(address, path, method, body))}</pre></section>"
    )


def _body_schema(openapi: dict[str, Any], route: dict[str, Any]) -> dict[str, Any]:
    content = route.get("requestBody", {}).get("content", {})
    schema: dict[str, Any] = content.get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = openapi["components"]["schemas"][name] if name else schema
    return found


def _command(address: str, path: str, method: str, body: dict[str, Any]) -> str:
    command = f"curl {address}{path}"
    if method != "get":
        command += " -H 'Content-Type: application/json'"
    if "examples" in body:
        command += f" -d '{json.dumps(body['examples'][0])}'"
    return command
