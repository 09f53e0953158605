"""Tells lm-eval of this package when it is imported; installed as ``_lm_eval_bh_startup``.

Python runs :func:`install` at every start, by way of ``lm_eval_bh.pth`` (``lm_eval_bh.start`` from
Python 3.15 on), and so this file imports nothing, neither lm-eval nor the rest of this package,
until somebody imports lm-eval. What it registers: see ``registration``.
"""

import sys

TYPE_CHECKING = False  # as in typing, whose import every start of Python would have to pay for
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Not lm_eval.api.registry: lm-eval registers its own models only while the registry is empty.
HOOKED = ("lm_eval.models", "lm_eval.tasks.manager")


class Finder:
    """Finds the hooked modules where they are, and adds a call to ``register()`` after they ran."""

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Return the spec of a hooked module with its loader wrapped, and None for all others."""
        if name not in HOOKED:
            return None
        # Not the other finders of sys.meta_path: if one of them did likewise, we would never end.
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
                # The folder of an editable installation may be gone: lm-eval must run all the same.
                if not (error.name or "").startswith("lm_eval_bh"):
                    raise
            else:
                registration.register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Put the finder in front of the others, unless it is there."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
