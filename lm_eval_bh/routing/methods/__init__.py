"""Methods that decide which experts serve a token, one published method per file.

To add a method, add a file: every module of this folder is imported, and ``rule=`` takes the
classes that have a ``name``. Tables, figures and reports take label and source from the class.
"""

from __future__ import annotations

import importlib
import pkgutil

from lm_eval_bh.routing.methods.base import METHODS, Method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Method"]
