"""``load_in_8bit``, ``load_in_4bit`` and ``bnb_4bit_*``, as transformers 5 expects them.

Transformers dropped these arguments for a single ``quantization_config``, and HFLM only passes on
the one in a model's own files.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from lm_eval_bh.errors import ParameterError

KINDS = ("fp4", "nf4")
BITS = ("load_in_8bit", "load_in_4bit")
DETAILS = (
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
)


def take_quantization(arguments: dict[str, Any]) -> Any:
    """Remove quantization arguments, and return the configuration or None.

    Parameters
    ----------
    arguments : dict
        The model's; ``quantization_config`` may be a dictionary or an object of transformers.

    Raises
    ------
    ParameterError
        If they contradict each other, or bitsandbytes is missing.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    given = arguments.pop("quantization_config", None)
    named = {name: arguments.pop(name) for name in (*BITS, *DETAILS) if name in arguments}
    asked = [name for name in BITS if named.get(name)]
    if given is not None and named:
        raise ParameterError(
            f"quantization_config contradicts {next(iter(named))}: give one of them."
        )
    details = [name for name in named if name in DETAILS]
    if details and "load_in_4bit" not in asked:
        raise ParameterError(
            f"{details[0]} has no meaning without load_in_4bit=True: give that too, or leave it "
            "out."
        )
    kind = named.get("bnb_4bit_quant_type", KINDS[0])
    if kind not in KINDS:
        raise ParameterError(f"bnb_4bit_quant_type must be {' or '.join(KINDS)}, not {kind!r:.80}.")
    if isinstance(given, (str, int, float, list)):
        raise ParameterError(
            f"quantization_config={given!r:.80} is not a configuration: in --model_args use "
            "load_in_8bit=True or load_in_4bit=True."
        )
    try:
        if isinstance(given, dict):
            return AutoQuantizationConfig.from_dict(given)
        found = BitsAndBytesConfig(**named) if asked else given
    except (AttributeError, TypeError, ValueError) as error:
        values = ", ".join(f"{name}={value}" for name, value in (named or given).items())
        reason = " ".join(str(error).split()).rstrip(".")
        raise ParameterError(
            f"{values} cannot be used ({reason}): use load_in_8bit=True or load_in_4bit=True."
        ) from error
    if asked and importlib.util.find_spec("bitsandbytes") is None:
        raise ParameterError(
            f"{asked[0]} needs bitsandbytes, which is not installed: pip install bitsandbytes, or "
            "leave it out."
        )
    return found
