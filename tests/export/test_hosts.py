"""The same files decide in every host: in the package, in hf-bh's hook, in an exported folder."""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from references import Reference
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig

from lm_eval_bh import BHRoutingIntegration, NullModel, Policy, PolicyError, RoutingConfig
from lm_eval_bh.export.layer_methods import files_of, layer_methods
from lm_eval_bh.export.model_folder import CHOSEN, chosen_methods
from lm_eval_bh.export.vllm_limits import check_engine
from lm_eval_bh.routing.config import GENERAL
from lm_eval_bh.routing.fitted import fitted_method
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.pick import pick, repeated
from lm_eval_bh.routing.methods.router import softmax_output
from lm_eval_bh.routing.methods.scores import STATISTICS, log_weights
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint
from lm_eval_bh.routing.tables.null_kind import NullKind

TOKENS, EXPERTS, LAYERS, NATIVE = 300, 16, 2, 4
LEVELS = {"top_p": 0.6, "min_p": 0.3, "min_w": 0.08}
LEVELS |= {"elbow": 1.0, "adaptive_k": 1.6, "naee": 0.5, "lexi": 2.5, "alloc_moe": 2.5}
LEVELS |= {"modes": 0.05, "ace": 0.2}
LEVELS |= dict.fromkeys(("by", "bonferroni", "holm", "hochberg"), 0.95)  # that reject little
BATCHES = {  # methods of a step, of which all tokens here are one
    "batch_min_w": {"alpha": 4.0},
    "batch_mass": {"step_budget": 7},
    "batch_bh": {"alpha": 0.9, "combine": "fisher"},
    "oea": {"max_k": 5, "k0": 1},
    "xshare": {"max_k": 5, "step_budget": 7},
    "sere": {"max_k": 5, "k0": 1},
}
UNSCALED = {"rule": "bh", "renormalize": False}
CONFIGS = [
    *(
        {"rule": rule}
        for rule, row in METHODS.items()
        if rule not in ("random_k", "oracle", "replay") and not row.joint
    ),
    *(
        {"rule": rule, "statistic": statistic}
        for rule in ("bh", "holm", "p_value", "top_p", "min_p", "topk", "min_w")
        for statistic in ("weight", "contribution", "benefit", "predicted")
    ),
    *(
        {"rule": rule, "null_scope": scope, "statistic": statistic}
        for rule, scope, statistic in itertools.product(
            [name for name, row in METHODS.items() if row.tests and not row.joint],
            ("expert", "model"),
            ("logit", "contribution"),
        )
    ),
    *(
        {"rule": rule, "of": "own", "statistic": statistic, "alpha": alpha}
        for rule, alpha in (("bh", 0.6), ("p_value", 0.3), ("top_p", 0.6), ("min_w", 0.08))
        for statistic in ("weight", "benefit")
    ),
    {"rule": "min_w", "of": "own", "statistic": "benefit", "max_k": 2, "mass": 0.2},
    {"rule": "min_w", "of": "own", "max_k": 2},
    {"rule": "elbow", "alpha": 2.0, "statistic": "benefit"},
    {"rule": "adaptive_k", "alpha": 1.4, "gap": 0.2, "k_values": "2-3-5-8"},
    {"rule": "naee", "alpha": 0.8, "max_k": 3},
    {"rule": "ace", "max_k": 3, "min_k": 2},
    {"rule": "alloc_moe", "alpha": 3.2, "min_k": 2, "mass": 0.5},
    {"rule": "bh", "min_k": 6, "max_k": 6, "null_scope": "expert"},
    {"rule": "min_w", "min_k": 6, "max_k": 6, "statistic": "benefit"},
    {"rule": "topk", "k_per_layer": "5-3"},
    {"rule": "topk", "max_k": 2, "mass": 0.5},
    {"rule": "topk", "max_k": 2, "k2": 6},
    {"rule": "topk", "max_k": 2, "k2": 16, "mass": 0.2},
    {"rule": "min_w", "of": "own", "statistic": "benefit", "max_k": 2, "k2": 3},
    {"rule": "naee", "k2": 12, "mass": 0.5},
    {"rule": "topk", "max_k": 2, "fold": True},
    {"rule": "topk", "max_k": 2, "fold": True, "statistic": "contribution"},
    {"rule": "min_w", "fold": True, "mass": 0.5},
    {"rule": "bh", "layers": "last1"},
    {"rule": "bh", "min_k": 2, "max_k": 3},
    {"rule": "bh", "temperature": 0.5},
    {"rule": "min_w", "alpha": 0.03, "max_k": 5, "mass": 0.5, "temperature": 1.5},
    {"rule": "bh", "temperature": 2.0, "statistic": "contribution"},
    {"rule": "bh", "renormalize": True},
    UNSCALED,
    {"rule": "min_w", "mass": 0.5},
    {"rule": "bh", "mass": 1.0, "max_k": 2, "statistic": "benefit"},
]
JOINT = [{"rule": rule, **BATCHES[rule]} for rule, row in METHODS.items() if row.joint]
CASES = [(case, rescales) for case in CONFIGS + JOINT for rescales in (False, True)]
cases = pytest.mark.parametrize(("parameters", "rescales"), CASES, ids=str)

# What runs where this package cannot be imported, with the files of an exported folder alone.
ELSEWHERE = """
import json, sys
sys.modules["lm_eval_bh"] = None
sys.path.insert(0, sys.argv[1])
import torch
from exported.methods_of_policy import METHODS
from exported.pick import pick, repeated
from exported.router import RouterOutput

answers = []
for settings, tables, router in torch.load(sys.argv[2]):
    settings = json.loads(settings)
    method = METHODS[settings["method"]](settings)
    method.load_state_dict(tables)
    method.to(torch.bfloat16).to(torch.float32)
    rounded = [n for n, t in method.state_dict().items() if not torch.equal(t, tables[n])]
    picked = pick(method, RouterOutput(**router))
    answers.append((rounded, tuple(picked), repeated(picked, method.num_experts).indices))
torch.save(answers, sys.argv[3])
"""


def rows(size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def logits_of(layer, tokens=TOKENS):
    return rows((tokens, EXPERTS), 9 + layer) * 1.5


def said(logits, slots, rescales):
    """Return the output of a router with the identity as projection: hidden states are logits."""
    return softmax_output(logits, slots, NATIVE, rescales=rescales, hidden_states=logits)


def config_of(parameters):
    return RoutingConfig.named({"alpha": LEVELS.get(parameters["rule"], 0.3)} | parameters)


def null_of(config, rescales):
    """Return a null model fitted to random numbers, if the method needs one."""
    if not config.needs_null:
        return None
    own = config.of == "own" and rescales
    return random_null(config.scored_by, config.null_scope, config.of, own, config.tables)


def random_table(name):
    """Return a plausible table of random numbers."""
    numbers = np.abs(rows((LAYERS, 1025), 4).double().numpy())
    if name in ("ratios", "slot_weights"):
        shares = np.sort(numbers / numbers.max(), axis=1)
        return shares if name == "ratios" else np.log(0.3 * shares + 0.01)
    if name in ("isolated", "perturbations"):  # falls to 0 at the native top-k
        return np.cumsum(numbers[:, :NATIVE], axis=1)[:, ::-1] - numbers[:, :1]
    if name == "folds":
        return np.stack([numbers[:, : EXPERTS**2], numbers[:, -(EXPERTS**2) :]], 1).reshape(
            LAYERS, 2, EXPERTS, EXPERTS
        )
    if name == "similarities":
        return np.sort(numbers[:, : EXPERTS**2]).reshape(LAYERS, EXPERTS, EXPERTS) / numbers.max()
    return numbers[:, 0] if name == "layer_kl" else numbers[:, :EXPERTS] + 0.5


@functools.cache
def random_null(statistic, scope, of, rescales, tables=()):
    row, factors, found = STATISTICS[statistic], None, []
    if row.table:
        shape = (LAYERS, EXPERTS + 2, EXPERTS) if row.predicts else (LAYERS, EXPERTS)
        factors = np.abs(rows(shape, 3).double().numpy()) + 0.5
    for layer in range(LAYERS):
        scores = logits = rows((500, EXPERTS), layer) * 1.5
        if row.weighs:
            scores = log_weights(said(logits, NATIVE, rescales), of)
        if row.table:
            means = factors[layer][-1] if row.predicts else factors[layer]
            scores = scores + torch.from_numpy(np.log(means))
        found.append(scores)
    kind = NullKind(statistic, scope, of=of, tables=tables).made()
    return NullModel.from_scores(
        found, kind, factors, {name: random_table(name) for name in tables}
    )


@pytest.fixture(scope="module")
def models():
    """Return OLMoE and Mixtral, which rescales, whose routers return their input."""
    sizes = {
        "vocab_size": 32,
        "hidden_size": EXPERTS,
        "intermediate_size": 8,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": NATIVE,
    }
    configs = (
        OlmoeConfig(num_experts=EXPERTS, **sizes),
        MixtralConfig(num_local_experts=EXPERTS, **sizes),
    )
    found = {}
    for rescales, config in enumerate(configs):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for router in find_routers(model):
            router.weight.data = torch.eye(EXPERTS)
        found[bool(rescales)] = model
    return found


def policy_of(parameters, rescales):
    fingerprint = router_fingerprint([torch.eye(EXPERTS)] * LAYERS)
    config = config_of(parameters)
    null = null_of(config, rescales)
    affine = np.ones((LAYERS, 2, EXPERTS)) if config.affine else None
    return Policy(config, fingerprint, LAYERS, EXPERTS, NATIVE, null_model=null, affine=affine)


def flat_files(folder, methods):
    """Write the methods' files of an exported folder."""
    folder.mkdir()
    (folder / "__init__.py").touch()
    for file in files_of(methods):
        shutil.copyfile(file, folder / file.name)
    (folder / CHOSEN).write_text(chosen_methods(methods), encoding="utf-8")


@pytest.fixture(scope="module")
def here():
    """Return the methods of every case, and their selections in the package."""
    found = {}
    for parameters, rescales in CASES:
        methods = layer_methods(policy_of(parameters, rescales))
        found[str(parameters), rescales] = [
            (method, pick(method, said(logits_of(layer), method.asks(NATIVE), rescales)))
            for layer, method in enumerate(methods)
        ]
    return found


@pytest.fixture(scope="module")
def elsewhere(here, tmp_path_factory):
    """Return all decisions in a process that only has the exported files."""
    folder = tmp_path_factory.mktemp("elsewhere")
    methods = [method for case in here.values() for method, _ in case]
    flat_files(folder / "exported", methods)
    jobs = []
    for (_, rescales), case in here.items():
        for layer, (method, _) in enumerate(case):
            settings = json.dumps(method.settings | {"method": method.name})
            router = said(logits_of(layer), method.asks(NATIVE), rescales)._asdict()
            jobs.append((settings, method.state_dict(), router))
    torch.save(jobs, folder / "jobs.pt")
    command = [sys.executable, "-c", ELSEWHERE]
    command += [str(folder / name) for name in ("", "jobs.pt", "answers.pt")]
    subprocess.run(command, check=True)
    answers = iter(torch.load(folder / "answers.pt"))
    return {case: [next(answers) for _ in range(LAYERS)] for case in here}


@cases
def test_an_exported_folder_decides_the_same(parameters, rescales, here, elsewhere):
    both = zip(here[str(parameters), rescales], elsewhere[str(parameters), rescales], strict=True)
    for (method, expected), (rounded, found, repeating) in both:
        assert not rounded, "a cast to bfloat16 and back has rounded tables"
        for ours, theirs in zip(expected, found, strict=True):
            assert torch.equal(ours, theirs)
        indices, unused = found[0], found[0] == EXPERTS
        assert torch.equal(repeating, torch.where(unused, indices[:, :1], indices))
        assert torch.equal((~unused).sum(-1), expected.counts)
        beyond = getattr(method, "beyond", False)
        if not (method.fixed or beyond or method.name == "lexi"):  # whose k is a layer's
            assert len(expected.counts.unique()) > 1, "the case would prove nothing"


@cases
def test_the_hook_of_hf_bh_decides_the_same(parameters, rescales, here, models):
    model = models[rescales]
    with BHRoutingIntegration(model, policy=policy_of(parameters, rescales)):
        for layer, (_, expected) in enumerate(here[str(parameters), rescales]):
            with torch.no_grad():
                _, weights, indices = model.model.layers[layer].mlp.gate(logits_of(layer))
            assert torch.equal(indices, expected.indices)
            torch.testing.assert_close(weights, expected.weights, rtol=1e-6, atol=1e-7)


@pytest.fixture
def vllm_router(monkeypatch):
    """Return our vLLM plugin's module of routers, with a replacement for its imports from vLLM."""
    inner = "vllm.model_executor.layers.fused_moe"
    names = ["vllm", "vllm.forward_context", "vllm.model_executor", "vllm.model_executor.layers"]
    names += [inner, f"{inner}.layer", f"{inner}.router", f"{inner}.router.custom_routing_router"]
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)
    modules["vllm.forward_context"].is_forward_context_available = lambda: False
    modules["vllm.forward_context"].get_forward_context = None
    modules[f"{inner}.router.custom_routing_router"].CustomRoutingRouter = SimpleNamespace
    modules[f"{inner}.layer"].create_fused_moe_router = SimpleNamespace
    for name in ("lm_eval_bh.export.vllm_router", "lm_eval_bh.export.vllm_step"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("lm_eval_bh.export.vllm_router")
    for name in ("lm_eval_bh.export.vllm_router", "lm_eval_bh.export.vllm_step"):
        sys.modules.pop(name, None)


def test_what_the_plugin_hands_to_vllm_decides_the_same(here, vllm_router):
    """With vLLM installed, test_vllm.py and test_vllm_families.py test it directly."""
    create = vllm_router.fused_moe.create_fused_moe_router
    for (_, rescales), case in here.items():
        with vllm_router.routes_made() as routes:
            for _ in case:
                vllm_router.fused_moe.create_fused_moe_router(
                    top_k=NATIVE, global_num_experts=EXPERTS, renormalize=rescales
                )
        for layer, (route, (method, expected)) in enumerate(zip(routes, case, strict=True)):
            runner = SimpleNamespace(layer_name=f"layers.{layer}.mlp.experts")
            runner.moe_config = SimpleNamespace(device="cpu", experts_per_token=NATIVE)
            runner.routed_experts = SimpleNamespace(top_k=NATIVE)
            route.bind(runner, rescales=rescales)
            route.decide_by(method)
            assert route.router.top_k == runner.moe_config.experts_per_token == method.max_k
            logits = logits_of(layer)
            weights, indices = route.router.custom_routing_function(
                logits, logits, method.max_k, rescales
            )
            assert torch.equal(weights, expected.weights)
            assert torch.equal(indices.long(), repeated(expected, EXPERTS).indices)
    assert vllm_router.fused_moe.create_fused_moe_router is create


def test_a_compiled_model_leaves_the_number_of_tokens_open(here, vllm_router):
    (_, rescales), [(method, expected), *_] = next(iter(here.items()))
    route = vllm_router.Route(
        SimpleNamespace, {"top_k": NATIVE, "global_num_experts": EXPERTS, "renormalize": rescales}
    )
    runner = SimpleNamespace(layer_name="layers.0.mlp.experts", moe_config=SimpleNamespace())
    runner.moe_config.device, runner.routed_experts = "cpu", SimpleNamespace()
    route.bind(runner, rescales=rescales)
    route.decide_by(method)
    compiled = torch.compile(
        lambda logits: route(logits, logits, method.max_k, rescales),
        fullgraph=True,
        backend="eager",
    )
    logits = logits_of(0).clone()
    torch._dynamo.mark_dynamic(logits, 0)  # which is an error where a graph fixes it
    weights, _ = compiled(logits)
    assert torch.equal(weights, expected.weights)


@pytest.mark.parametrize("foreign", ["custom_routing_function", "hash_indices_table"])
def test_a_router_of_vllm_that_ranks_nothing_is_refused(foreign, vllm_router):
    arguments = {"top_k": NATIVE, "global_num_experts": EXPERTS, foreign: object()}
    with pytest.raises(PolicyError, match=f"routers use {foreign}"):
        vllm_router.Route(SimpleNamespace, arguments)


def served(**changes):
    """Return vLLM's configuration for a model, as far as it is used."""
    parallel = {"tensor_parallel_size": 1, "data_parallel_size": 1, "enable_expert_parallel": False}
    parallel = {name: changes.get(name, value) for name, value in parallel.items()}
    model = SimpleNamespace(quantization=changes.get("quantization"))
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), model_config=model)


@pytest.mark.parametrize(
    ("changes", "version", "sentence"),
    [
        ({"tensor_parallel_size": 2}, "0.32.0", "tensor_parallel_size=2"),
        ({"enable_expert_parallel": True}, "0.33.1", "expert parallelism"),
        ({"quantization": "fp8"}, "0.32.0", "quantization=fp8"),
        ({}, "0.31.2", r"vLLM 0.31.2 \(tested: 0.32; read: 0.33\)"),
    ],
)
def test_what_no_policy_was_compared_under_is_refused_unless_forced(
    changes, version, sentence, monkeypatch
):
    assert check_engine("0.32.0", served()) == []
    with pytest.raises(PolicyError, match=f"{sentence}.*LM_EVAL_BH_FORCE=1"):
        check_engine(version, served(**changes))
    monkeypatch.setenv("LM_EVAL_BH_FORCE", "1")
    [doubt] = check_engine(version, served(**changes))
    assert re.fullmatch(sentence, doubt)


def test_tokens_that_are_decoded_are_one_step(vllm_router, monkeypatch):
    """A prompt of three tokens, one decoded token, a prompt of two, and one row that fills up."""
    starts = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    metadata = {"layers.0.attn": SimpleNamespace(query_start_loc=starts)}
    step = sys.modules["lm_eval_bh.export.vllm_step"]
    assert step.decode_step(7, torch.device("cpu")) is None
    monkeypatch.setattr(step, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(
        step, "get_forward_context", lambda: SimpleNamespace(attn_metadata=metadata)
    )
    found = step.decode_step(7, torch.device("cpu"))
    assert found.tolist() == [-1, -1, -1, 0, -1, -1, -1]


# With renormalize=False a rescaling router's scale is that of as many experts as it is asked for.
@pytest.mark.parametrize(
    ("parameters", "rescales"),
    [
        (parameters, rescales)
        for parameters, rescales in CASES
        if parameters not in JOINT and (parameters, rescales) != (UNSCALED, True)
    ]
    + [({"rule": "random_k", "max_k": 5, "seed": 7}, False)],
    ids=str,
)
def test_it_decides_what_a_slow_plain_reference_does(parameters, rescales):
    layer, config = LAYERS - 1, config_of(parameters)
    config, null = config.for_layer(layer, LAYERS), null_of(config, rescales)
    reference = Reference(
        config.rule,
        config.alpha,
        {name: getattr(config, name) for name in (*GENERAL, *config.method.declared)},
        NATIVE,
        rescales,
        layer=layer,
    )
    if null is not None:
        reference.factors, reference.tables = null.layer(layer).factors, null.measured
        if config.tests:
            x, cdf = (np.atleast_2d(table) for table in null.cdf(layer))
            reference.nulls = list(zip(x, cdf, strict=True))
    method = fitted_method(config, null, layer, EXPERTS)
    logits = logits_of(layer, 30).double()
    found = pick(method, said(logits, method.asks(NATIVE), rescales))
    for token, z in enumerate(logits.numpy()):
        expected, count = reference.experts(z, z), int(found.counts[token])
        assert found.indices[token, :count].tolist() == list(expected)
        weights = list(expected.values())
        np.testing.assert_allclose(found.weights[token, :count], weights, rtol=1e-5)


def test_what_is_copied_needs_neither_the_package_nor_imports_that_transformers_misses():
    """Transformers follows ``from .name import``, and does not accept a folder as a module."""
    for file in files_of(METHODS[name](_plain(name)) for name in METHODS):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2
                assert node.module
                assert not node.module.startswith("lm_eval_bh")
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("lm_eval_bh") for name in node.names)


def _plain(name):
    return RoutingConfig(rule=name).settings(0, EXPERTS)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"rule": "random_k"}, "the nearest rule that can be exported is rule=topk"),
        ({"rule": "replay", "routes": "x"}, "export the policy with which the log was made"),
        ({"rule": "topk", "mode": "analyze"}, "only counts"),
        ({"rule": "oracle"}, "the nearest rule that can be exported is rule=min_w"),
        ({"rule": "topk", "affine": True}, "make a policy without it"),
    ],
)
def test_what_no_engine_can_do_is_refused(parameters, sentence):
    with pytest.raises(PolicyError, match=sentence):
        layer_methods(policy_of(parameters, False))
