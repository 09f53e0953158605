"""Small runs with exactly known routing logs, and functions to compare them."""

from __future__ import annotations

from lm_eval.api.instance import Instance

# Windows of 48 tokens cut documents into pieces and contexts on the left; in float64 no rounding
# that depends on the shape of a batch can tip a decision.
ARGS = "pretrained=tiny-olmoe,alpha=0.5,max_k=6,dtype=float64,experts=ragged,max_length=48"
LIMIT = 3


def counters(results):
    """Return the exact counters of every task."""
    return {
        task: {
            name: [layer[name] for layer in summary["layers"]]
            for name in ("histogram", "usage", "cross")
        }
        for task, summary in results["config"]["bh"]["summary"]["tasks"].items()
    }


def instances(kind, *arguments, **fields):
    """Make requests by hand: one document each."""
    metadata = {"task": "by_hand", "repeats": 1} | fields
    return [
        Instance(kind, {}, args, 0, metadata=(metadata["task"], number, metadata["repeats"]))
        for number, args in enumerate(arguments)
    ]
