"""Registration with lm-eval by ``import lm_eval_bh``, before or after lm-eval loads."""

from __future__ import annotations

from lm_eval_bh.harness.plugin.registration import register

try:
    import _lm_eval_bh_startup as startup  # only installations have it there
except ModuleNotFoundError:
    from lm_eval_bh.harness.plugin import startup  # a checkout on PYTHONPATH


def activate() -> None:
    """Register with the loaded parts of lm-eval, and with the others when they load.

    It does not import lm-eval, and may be called any number of times.
    """
    startup.install()
    register()
