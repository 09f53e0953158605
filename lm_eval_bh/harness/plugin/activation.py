"""What ``import lm_eval_bh`` does about lm-eval, whether it is loaded already or not."""

from __future__ import annotations

from lm_eval_bh.harness.plugin.registration import register

try:
    import _lm_eval_bh_startup as startup  # an installation has it there, and only there
except ModuleNotFoundError:
    from lm_eval_bh.harness.plugin import startup  # a checkout on PYTHONPATH


def activate() -> None:
    """Register with the parts of lm-eval that are loaded, and with the others once they are.

    It does not import lm-eval, and may be called any number of times.
    """
    startup.install()
    register()
