"""Great Expectations' own pages, of templates that a process compiles once instead of for every gate."""

from __future__ import annotations

from typing import Any, ClassVar

from great_expectations.render.view import DefaultJinjaIndexPageView, DefaultJinjaPageView
from jinja2 import BytecodeCache, Environment
from jinja2.bccache import Bucket


class _Compiled(BytecodeCache):
    _by_key: ClassVar[dict[str, bytes]] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        compiled = self._by_key.get(bucket.key)
        if compiled is not None:
            bucket.bytecode_from_string(compiled)

    def dump_bytecode(self, bucket: Bucket) -> None:
        self._by_key[bucket.key] = bucket.bytecode_to_string()


class _FromCompiled:
    """Before a view of Great Expectations': its templates are those of the process."""

    env: Environment

    def __init__(
        self, custom_styles_directory: str | None = None, custom_views_directory: str | None = None
    ) -> None:
        super().__init__(custom_styles_directory, custom_views_directory)  # type: ignore[call-arg]
        self.env.bytecode_cache = _Compiled()


class Page(_FromCompiled, DefaultJinjaPageView):  # type: ignore[misc]
    """A suite, or what it found."""


class IndexPage(_FromCompiled, DefaultJinjaIndexPageView):  # type: ignore[misc]
    """The list of them."""


def site(store_backend: dict[str, Any]) -> dict[str, Any]:
    """Configuration of a site of these pages that is kept in `store_backend`."""

    def view(name: str) -> dict[str, dict[str, str]]:
        return {"view": {"module_name": __name__, "class_name": name}}

    return {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": store_backend,
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder", **view("IndexPage")},
        "site_section_builders": {
            "expectations": view("Page"),
            "validations": view("Page"),
            "profiling": "None",
        },
    }
