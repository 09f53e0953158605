"""Registers this package when lm-eval is imported; installed as ``_lm_eval_bh_startup``.

Python runs :func:`install` at every start, by ``lm_eval_bh.pth`` (``lm_eval_bh.start`` from Python
3.15 on). This file therefore imports nothing, neither lm-eval nor the rest of this package, until
lm-eval is imported. See ``registration`` for what it registers.
"""

import sys

TYPE_CHECKING = False  # as in typing, whose import would slow every start of Python
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Not lm_eval.api.registry: lm-eval registers its own models only while the registry is empty.
HOOKED = ("lm_eval.models", "lm_eval.tasks.manager")


class Finder:
    """Finds the hooked modules, and adds a call of ``register()`` after their import."""

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Return the spec of a hooked module with a wrapped loader, and None for all others."""
        if name not in HOOKED:
            return None
        # Not the other finders of sys.meta_path: one that did the same would cause a loop.
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            execute(module)
            try:
                from lm_eval_bh.harness.plugin import registration
            except ModuleNotFoundError as error:
                # The folder of an editable installation may be gone: lm-eval must still run.
                if not (error.name or "").startswith("lm_eval_bh"):
                    raise
            else:
                registration.register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Put the finder in front of the others, unless it is there already."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
