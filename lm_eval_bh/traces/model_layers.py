"""Tells from a model's configuration which layers have a router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval_bh.traces.trace_document import MOST_LAYERS


def layers_with_router(config: dict[str, Any]) -> list[bool] | None:
    """Return whether each hidden layer has a router; None if the configuration does not say.

    The keys are those of transformers' configurations: ``first_k_dense_replace`` and
    ``moe_layer_freq`` (DeepSeek, GLM, Kimi), ``mlp_only_layers`` and ``decoder_sparse_step``
    (Qwen), ``moe_layers`` and ``interleave_moe_layer_step`` (Llama 4), ``moe_layer_start_index``,
    ``moe_layer_end_index`` and ``moe_layer_interval`` (Ernie), ``expert_layer_period`` and
    ``expert_layer_offset`` (Jamba), ``mlp_layer_types`` (transformers 5).
    """
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    number = _natural(config, "num_hidden_layers", least=1)
    if number is None or number > MOST_LAYERS:
        return None
    rules = [rule for read in _RULES if (rule := read(config, number)) is not None]
    return [all(rule(i) for rule in rules) for i in range(number)] if rules else None


Rule = Callable[[int], bool]


def _natural(config: dict[str, Any], name: str, least: int = 0) -> int | None:
    value = config.get(name)
    return value if type(value) is int and value >= least else None


def _naturals(config: dict[str, Any], name: str) -> list[int] | None:
    value = config.get(name)
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        return None
    return value


def _types(config: dict[str, Any], number: int) -> Rule | None:
    types = config.get("mlp_layer_types")
    if not isinstance(types, list) or len(types) != number:
        return None
    return lambda i: bool(types[i] == "sparse")


def _first(config: dict[str, Any], number: int) -> Rule | None:
    first = _natural(config, "first_k_dense_replace")
    return None if first is None else lambda i: i >= first


def _frequency(config: dict[str, Any], number: int) -> Rule | None:
    listed = _naturals(config, "moe_layer_freq")
    if listed is not None and len(listed) == number:
        return lambda i: bool(listed[i])
    step = _natural(config, "moe_layer_freq", least=1)
    return None if step is None else lambda i: i % step == 0


def _only(config: dict[str, Any], number: int) -> Rule | None:
    dense = _naturals(config, "mlp_only_layers")
    return None if dense is None else lambda i: i not in dense


def _step(config: dict[str, Any], number: int) -> Rule | None:
    step = _natural(config, "decoder_sparse_step", least=1)
    return None if step is None else lambda i: (i + 1) % step == 0


def _listed(config: dict[str, Any], number: int) -> Rule | None:
    layers = _naturals(config, "moe_layers")
    if layers is not None:
        return lambda i: i in layers
    step = _natural(config, "interleave_moe_layer_step", least=1)
    return None if step is None else lambda i: (i + 1) % step == 0


def _between(config: dict[str, Any], number: int) -> Rule | None:
    start = _natural(config, "moe_layer_start_index")
    step = _natural(config, "moe_layer_interval", least=1)
    if start is None or step is None:
        return None
    end = _natural(config, "moe_layer_end_index")
    last = number - 1 if end is None else end
    return lambda i: start <= i <= last and (i + 1) % step == 0


def _period(config: dict[str, Any], number: int) -> Rule | None:
    period = _natural(config, "expert_layer_period", least=1)
    offset = _natural(config, "expert_layer_offset")
    return None if period is None or offset is None else lambda i: i % period == offset


_RULES = (_types, _first, _frequency, _only, _step, _listed, _between, _period)
