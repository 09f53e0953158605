"""Options of llama.cpp that route by a policy, where that is possible."""

from __future__ import annotations

from lm_eval_bh.errors import PolicyError
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.routing.policy import Policy


def llama_cpp_options(policy: Policy, checkpoint: Checkpoint) -> list[str]:
    """Return lines to print: options, and notes on them.

    llama.cpp's OLMoE takes the ``expert_used_count`` largest softmax weights over all experts and
    never rescales them (``llm_graph_context::build_moe_ffn`` with ``norm_w`` false). ik_llama.cpp's
    ``-ser K,t`` drops experts after the first K whose weight is less than t times the largest,
    which is ``min_p`` with ``min_k``: both keep an expert at the threshold (``>=`` in its
    ``argsort.cu``, although its description, pull request 239, says ``>``).

    Parameters
    ----------
    policy : Policy
        The policy.
    checkpoint : Checkpoint
        The policy's model.

    Raises
    ------
    PolicyError
        If llama.cpp cannot run the policy.
    """
    config = policy.config
    nearest = policy.native_top_k
    if policy.solution is not None:
        nearest = max(1, round(policy.solution.mean_experts))
    if checkpoint.config["model_type"] != "olmoe" or checkpoint.normalizes:
        raise _refused(
            f"models of type {checkpoint.config['model_type']!r} are not known to route there "
            "as they do here (only OLMoE without norm_topk_prob is)",
            nearest,
        )
    if config.mode != "patch" or config.select_layers(policy.num_layers) != list(
        range(policy.num_layers)
    ):
        raise _refused("its options hold for all layers", nearest)
    method = config.method(config.settings(0, policy.num_experts))
    if config.temperature != 1 or method.gains or config.affine or config.renormalize is True:
        raise _refused("it has neither weight rescaling nor temperature", nearest)
    plain = method.follows_router and config.statistic == "logit"
    option = f"--override-kv olmoe.expert_used_count=int:{config.max_k}"
    if plain and len(set(config.counts_per_layer)) > 1:
        return [
            f"olmoe.expert_used_count = {list(config.counts_per_layer)}",
            "This is an array in the GGUF's metadata, which --override-kv cannot write. Builds "
            "differ: that of xllamacpp 2026.10.11549 gives each layer its number, others may not "
            "(llama.cpp's issue 28380): compare as scripts/verify_llama_cpp.py does.",
        ]
    if plain and config.fixed_count:
        return [option]
    if plain and config.rule == "min_p":
        alpha = config.alpha if policy.solution is None else _shared(policy, nearest)
        return [
            f"{option} -ser {config.min_k},{alpha!r}",
            f"Equal to this policy: a token's first {config.min_k} experts serve, and further "
            f"ones, up to {config.max_k}, whose weight is at least {alpha!r} times the largest, "
            "including those at the threshold; neither rescales OLMoE's weights. Not equal: the "
            "engine compares weights after its own rounding, so the decision about an expert "
            "next to the threshold can differ.",
            "These options are for ik_llama.cpp, whose newer sources read -ser but ignore it "
            "(llm_build_moe_ffn calls ggml_top_k, not ggml_top_k_thresh): check that the option "
            "changes the perplexity there.",
        ]
    raise _refused(f"it has nothing like rule={config.rule} with these parameters", nearest)


def _shared(policy: Policy, nearest: int) -> float:
    assert policy.solution is not None
    alphas = set(policy.solution.alphas.values())
    if len(alphas) > 1:
        raise _refused("-ser has one threshold for all layers", nearest)
    return alphas.pop()


def _refused(reason: str, nearest: int) -> PolicyError:
    return PolicyError(
        f"llama.cpp cannot run this policy: {reason}; the nearest is rule=topk,max_k={nearest}."
    )
