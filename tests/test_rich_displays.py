"""Displays of the package's objects in notebooks; the view has its own tests."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

import lm_eval_bh
from lm_eval_bh import BHRoutingIntegration
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.resources import tiny_olmoe


def test_a_selection_shows_its_first_tokens():
    logits = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    found = lm_eval_bh.select_experts(logits, rule="min_p", alpha=0.5, max_k=4)
    shown = found._repr_html_()
    assert shown.count("<tr>") == 1 + 12
    mean = float(found.counts.double().mean())
    assert f"20 tokens, {mean:.2f} experts per token; the first 12" in shown
    count = int(found.counts[3])
    pairs = zip(found.indices[3, :count].tolist(), found.weights[3, :count].tolist(), strict=True)
    cell = ", ".join(f"{expert} ({weight:.3f})" for expert, weight in pairs)
    assert f"<td>3</td><td>{count}</td><td>{cell}</td>" in shown


def test_an_integration_shows_its_settings_and_statistics():
    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=torch.float32)
    routing = BHRoutingIntegration(model, alpha=0.4, max_k=8)
    assert "<td>patched</td><td>False</td>" in routing._repr_html_()
    with routing:
        model(torch.tensor([[1, 2, 3]]))
        shown = routing._repr_html_()
        mean = routing.get_routing_stats()["mean_experts_per_token"]
    assert "<td>alpha</td><td>0.4</td>" in shown
    assert "<td>patched</td><td>True</td>" in shown
    assert f"<td>mean_experts_per_token</td><td>{mean:.3g}</td>" in shown
    assert "OlmoeForCausalLM, 4 layers" in shown


def test_results_show_their_table(write):
    write("<b>", rule="topk")
    (write.folder / "results_broken.json").write_text("{")
    shown = load_experiments([write.folder])._repr_html_()
    assert shown.count("<tr") == 1 + 3
    assert "top-4" in shown
    assert "Files left out: 1." in shown
