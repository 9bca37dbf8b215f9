"""Feast without what a process that reads never uses: a quarter of the time of `import feast`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_TORCH = "feast.torch_wrapper"


def import_feast() -> None:
    """Import Feast unless that was done, without torch and the checks of argument types.

    Feast 0.67 imports torch for `to_tensor`, and has typeguard compile most of its classes again: together
    3.5 of 4.7 s of processor time. torch comes with the first call that needs it. Arguments are checked as
    ever in a process that imports Feast before the modules of feast_ducklake.online, as `feast apply` does.
    """
    if "feast" in sys.modules:
        return
    import typeguard

    checked = typeguard.typechecked
    typeguard.typechecked = _unchecked
    sys.modules.setdefault(_TORCH, _torch_when_asked())
    try:
        import feast  # noqa: F401
    finally:
        typeguard.typechecked = checked


def _unchecked(target: Any = None, **_: object) -> Any:
    """As typeguard's decorator, with arguments or without."""
    return target if target is not None else lambda decorated: decorated


def _torch_when_asked() -> ModuleType:
    """In place of Feast's module that imports torch: imports it when a function asks for torch."""
    module = ModuleType(_TORCH)

    def get_torch() -> ModuleType:
        if sys.modules.get(_TORCH) is module:
            del sys.modules[_TORCH]
        torch: ModuleType = importlib.import_module(_TORCH).get_torch()
        return torch

    module.get_torch = get_torch  # type: ignore[attr-defined]
    return module
