"""A forward pass on a device lets the host wait once, at its end: shown without the device.

torch's FakeTensorMode runs tensors of ``device="cuda"`` that have shapes, dtypes and devices, but
no values, on a build without CUDA. An operation on tensors of two devices raises in it, and so does
every operation that needs a value on the host: ``item()``, ``bool()``, ``nonzero()``, a boolean
index. A copy to the CPU does not raise; it is listed here.

What cannot run so:

- values: it is not shown that kernels compute the same as the CPU;
- the expert loop, which is only for a CPU, and the "full" log, which copies to the host by
  design;
- transformers' attention masks for sdpa, whose shape depends on whether there is padding: the model
  has "eager" attention here;
- the stopwatch of the summary log, which waits for the device before and after a pass, and the
  look-up of the rows of a batch, before it: both are given a CPU here;
- the first pass without an attention mask, which looks once for padding;
- indexing, assignment, ``~`` and ``contiguous()`` as Python spells them: they ask for the device
  itself, so the operators behind them are called in their place.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OlmoeConfig, OlmoeForCausalLM

from lm_eval_bh import BHRoutingIntegration, NullModel, RoutingConfig
from lm_eval_bh.harness.logs.expected_rows import ExpectedRows
from lm_eval_bh.harness.logs.ownership import Owner
from lm_eval_bh.harness.logs.recorder import Recorder
from lm_eval_bh.harness.logs.summary_log import SummaryLog
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.scores import STATISTICS

LAYERS, EXPERTS, HIDDEN, ROWS, LENGTH = 2, 16, 32, 2, 12
aten = torch.ops.aten


class Spelling(TorchFunctionMode):
    """Calls operators where Python's spelling of them asks for a device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            return indexed(*args)
        if func is torch.Tensor.__setitem__:
            values, at, new = args
            if isinstance(at, torch.Tensor):
                return aten.index_put_.default(values, [at], new)
            return indexed(values, at).copy_(new)
        if func is torch.Tensor.__invert__:
            return aten.bitwise_not.default(args[0])
        if func is torch.Tensor.contiguous:
            return aten.contiguous.default(args[0])
        return func(*args, **(kwargs or {}))


def indexed(values, index):
    """Return ``values[index]`` by the operators themselves."""
    index = index if isinstance(index, tuple) else (index,)
    dots = [at for at, each in enumerate(index) if each is Ellipsis]
    if dots:
        missing = values.ndim - sum(each is not None for each in index) + 1
        index = (*index[: dots[0]], *[slice(None)] * missing, *index[dots[0] + 1 :])
    dim, tensors = 0, {}
    for each in index:
        if each is None:
            values = values.unsqueeze(dim)
        elif isinstance(each, slice):
            values = aten.slice.Tensor(values, dim, each.start, each.stop, each.step or 1)
        elif isinstance(each, int):
            values = aten.select.int(values, dim, each)
            continue
        else:
            tensors[dim] = each
        dim += 1
    if not tensors:
        return values
    return aten.index.Tensor(values, [tensors.get(at) for at in range(max(tensors) + 1)])


class Copies(TorchDispatchMode):
    """Lists the operators that copy from the device to the host."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if (
            isinstance(result, torch.Tensor)
            and result.device.type == "cpu"
            and any(each.device.type == "cuda" for each in tensors)
        ):
            self.found.append(str(func))
        return result


class HostSummary(SummaryLog):
    """Prepares a batch with values, as they are on the host."""

    def begin(self, batch, device):
        with unset_fake_temporarily():
            super().begin(batch, device)
            assert batch.lengths  # kept for the end of the pass


@pytest.fixture(scope="module")
def model():
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        eos_token_id=1,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return OlmoeForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture
def a_card(monkeypatch):
    """Tell transformers of a card that its grouped matrix product runs on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def null_of(statistic, scope, tables):
    generator = torch.Generator().manual_seed(0)
    logits = {layer: torch.randn(200, EXPERTS, generator=generator) for layer in range(LAYERS)}
    null = NullModel.fit(logits, points=64, null_scope=scope)
    if not STATISTICS[statistic].table:
        factors = None
    elif STATISTICS[statistic].predicts:
        factors = np.ones((LAYERS, HIDDEN + 2, EXPERTS))
    else:
        factors = np.ones((LAYERS, EXPERTS))
    shapes = {"layer_kl": (LAYERS,)} | dict.fromkeys(("spectra", "responses"), (LAYERS, EXPERTS))
    shapes |= {"folds": (LAYERS, 2, EXPERTS, EXPERTS), "similarities": (LAYERS, EXPERTS, EXPERTS)}
    measured = {name: np.ones(shapes.get(name, (LAYERS, 4))) for name in tables}
    header = dataclasses.replace(null.header, statistic=statistic, tables=list(tables))
    return NullModel(null.tables, header, factors, measured)


@contextmanager
def on_a_fake_card(model):
    """Put tensors without values, on a card that is not there, in place of all of the model's."""
    held = [
        (kept, name, tensor)
        for module in model.modules()
        for kept in (module._parameters, module._buffers)
        for name, tensor in kept.items()
        if tensor is not None
    ]
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            for kept, name, tensor in held:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                if isinstance(tensor, torch.nn.Parameter):
                    fake = torch.nn.Parameter(fake, requires_grad=False)
                kept[name] = fake
            yield
        finally:
            for kept, name, tensor in held:
                kept[name] = tensor


def passes(model, routing, monkeypatch):
    """Run the patched model, recorded; return what the host waited for, and what was copied."""
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) + 1
    requests = [(None, row[:-4], [*row[-4:], 0]) for row in ids.tolist()]
    owners = [Owner("task", row, 0) for row in range(ROWS)]
    summary = HostSummary(LAYERS, EXPERTS, RoutingConfig())
    recorder = Recorder(model.model, summary)
    routing.observers.append(recorder.observe)
    with recorder.expecting(ExpectedRows(requests, owners, LENGTH)):
        logging = recorder.forward(ids)
        logging.__enter__()
        waits = []
        monkeypatch.setattr(
            FakeTensor, "tolist", lambda self: waits.append(self.shape) or [True] * len(self)
        )
        with on_a_fake_card(model), torch.no_grad(), Spelling(), Copies() as copies:
            given = torch.ones(ROWS, LENGTH, dtype=torch.int64, device="cuda")
            out = model(given, attention_mask=given, use_cache=False)
            assert out.logits.device.type == "cuda"
            logging.__exit__(None, None, None)
        assert summary.tasks["task"]._sums._parts  # it was counted
    return waits, copies.found


def settings():
    for name, rule in METHODS.items():
        # The one looks at the token ids, before the pass; the other runs experts.
        if rule.recorded or rule.runs_experts:
            continue
        yield {"rule": name} | ({"step_budget": 6} if "step_budget" in rule.declared else {})
        if not rule.tests and name != "min_w":
            continue
        for statistic in STATISTICS:
            if statistic != "logit":
                yield {"rule": name, "statistic": statistic}
        if rule.tests and name in ("bh", "p_value"):
            for statistic in STATISTICS:
                yield {"rule": name, "statistic": statistic, "null_scope": "expert"}
    yield {"rule": "bh", "renormalize": True}
    yield {"rule": "bh", "mass": 0.5}
    yield {"rule": "topk", "max_k": 2, "fold": True}
    yield {"rule": "bh", "temperature": 2.0}
    yield {"rule": "bh", "mode": "analyze"}
    yield {"rule": "bh", "min_k": 4, "max_k": 4}
    yield {"rule": "bh", "experts": "grouped_mm"}


@pytest.mark.parametrize(
    "given", list(settings()), ids=lambda given: "-".join(map(str, given.values()))
)
def test_the_host_waits_once_a_pass(model, a_card, monkeypatch, given):
    given = {"max_k": 6, "alpha": 0.4} | given
    config = RoutingConfig.named({name: v for name, v in given.items() if name != "experts"})
    null = null_of(config.scored_by, config.null_scope, config.tables)
    with BHRoutingIntegration(model, kde=null, **given) as routing:
        waits, copied = passes(model, routing, monkeypatch)
    assert waits == [torch.Size([LAYERS])]  # the extremes of each layer's logits
    assert copied == []


def test_what_waits_is_noticed(model, a_card, monkeypatch):
    null = null_of("logit", "layer", ())
    with BHRoutingIntegration(model, kde=null, max_k=6) as routing:
        routing.observers.append(lambda layer, logits, selection: selection.counts.cpu())
        assert len(passes(model, routing, monkeypatch)[1]) == LAYERS
        for ask in (
            lambda layer, logits, selection: selection.counts.sum().item(),
            lambda layer, logits, selection: bool((selection.counts > 0).all()),
        ):
            routing.observers[:] = [ask]
            with pytest.raises(DataDependentOutputException):
                passes(model, routing, monkeypatch)
