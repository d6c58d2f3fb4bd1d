"""Formulas for torch.utils.flop_counter, registered when somebody counts: importing it loads Triton, some 70 MiB."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["flop_formula"]

_COUNTER = "torch.utils.flop_counter"

Formula = Callable[..., int]
_waiting: list[tuple[Any, Formula]] = []


def flop_formula(targets: Any) -> Callable[[Formula], Formula]:
    """As ``torch.utils.flop_counter.register_flop_formula``, but without importing it."""

    def keep(formula: Formula) -> Formula:
        if (module := sys.modules.get(_COUNTER)) is not None and hasattr(module, "register_flop_formula"):
            module.register_flop_formula(targets)(formula)
        else:
            _waiting.append((targets, formula))
        return formula

    return keep


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the import of the counter end with the registration of what waits."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for targets, formula in _waiting:
                module.register_flop_formula(targets)(formula)
            _waiting.clear()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Finder())
