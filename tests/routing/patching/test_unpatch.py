"""Hooks can always be removed: from copies, adapters and offloaded routers too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from transformers import AutoModelForCausalLM

import lm_eval_bh
from lm_eval_bh import BHRoutingIntegration, ModelError, NullModelError
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def state(model):
    """Everything that patching could leave behind, module by module."""
    kinds = [kind for kind in vars(torch.nn.Linear(1, 1)) if kind.endswith(("_hooks", "_kwargs"))]
    kinds.append("_forward_hooks_always_called")
    return [
        (
            name,
            [len(getattr(module, kind)) for kind in kinds],
            {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))},
            type(getattr(module, "_gradient_checkpointing_func", None)),
        )
        for name, module in model.named_modules()
    ]


def saved(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


COPIES = {
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "save": saved,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("arguments", [{"alpha": 0.5}, {"rule": "topk", "max_k": 3}])
def test_a_copy_of_a_patched_model_can_be_unpatched(tiny, null, ids, tmp_path, how, arguments):
    plain, before = logits(tiny, ids), state(tiny)
    given = arguments if "rule" in arguments else arguments | {"kde": null}
    with BHRoutingIntegration(tiny, **given) as routing:
        routed = logits(tiny, ids)
        twin = COPIES[how](tiny, tmp_path)
        counted = routing.counters.tokens(0)
        assert torch.equal(logits(twin, ids), routed)
        assert routing.counters.tokens(0) == counted  # the copy counts for itself
        with pytest.raises(ModelError, match=r"patched already.*lm_eval_bh\.unpatch\(model\)"):
            BHRoutingIntegration(twin, **given).patch_model()
        lm_eval_bh.unpatch(twin)
        assert state(twin) == before
        assert torch.equal(logits(twin, ids), plain)
        assert twin.get_experts_implementation() != {"": "bh_ragged"}
        assert torch.equal(logits(tiny, ids), routed)  # and the original is as it was
    with BHRoutingIntegration(twin, **given):
        assert torch.equal(logits(twin, ids), routed)


def test_unpatch_takes_out_what_an_integration_put_in(tiny, null, ids):
    plain, before = logits(tiny, ids), state(tiny)
    lm_eval_bh.unpatch(tiny)  # nothing of ours is in it
    assert state(tiny) == before
    routing = BHRoutingIntegration(tiny, alpha=0.5, kde=null).patch_model()
    lm_eval_bh.unpatch(tiny)
    assert not routing.patched
    assert routing.rows_computed is None
    assert state(tiny) == before
    assert torch.equal(logits(tiny, ids), plain)
    with BHRoutingIntegration(tiny, alpha=0.3, kde=null) as other:
        found = state(tiny)
        routing.unpatch_model()  # it has nothing in the model any more
        assert state(tiny) == found
        assert other.patched


def test_a_patched_router_still_tells_its_own_top_k(tiny, ids):
    with BHRoutingIntegration(tiny, rule="topk", max_k=3):
        assert {router.top_k for router in find_routers(tiny)} == {8}
    assert {router.top_k for router in find_routers(tiny)} == {8}


def test_a_null_model_gone_stale_by_training_is_noticed(tiny, null, ids):
    routing = BHRoutingIntegration(tiny, alpha=0.5, kde=null)
    with routing:
        logits(tiny, ids)
    before = state(tiny)
    optimizer = torch.optim.SGD(tiny.parameters(), lr=10.0)
    tiny(ids, labels=ids).loss.backward()
    optimizer.step()
    with pytest.raises(NullModelError, match="have changed since the null model was fitted"):
        routing.patch_model()
    assert state(tiny) == before


@pytest.mark.parametrize("what", ["dispatch to disk", "offload to the CPU"])
@pytest.mark.filterwarnings("ignore")
def test_offloaded_routers_are_read_through_their_hooks(tiny, null, ids, tmp_path, what):
    with BHRoutingIntegration(tiny, alpha=0.5, kde=null) as routing:
        expected = logits(tiny, ids)
    fingerprint = router_fingerprint(router.weight for router in routing.routers)
    if what == "dispatch to disk":
        places = {name.rpartition(".")[0]: "cpu" for name, _ in tiny.named_parameters()}
        places |= {"model.rotary_emb": "cpu", "lm_head": "cpu", "model.layers.1.mlp.gate": "disk"}
        dispatch_model(tiny, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    else:
        cpu_offload(tiny, execution_device="cpu")
    routers = find_routers(tiny)
    assert any(router.module.weight.is_meta for router in routers)
    assert router_fingerprint(router.weight for router in routers) == fingerprint
    with BHRoutingIntegration(tiny, alpha=0.5) as routing:  # found by its fingerprint
        assert routing.null_model.header == null.header
        torch.testing.assert_close(logits(tiny, ids), expected)
    remove_hook_from_submodules(tiny)


@pytest.mark.parametrize("saved", [["gate"], ["mlp"]])
@pytest.mark.filterwarnings("ignore")
def test_only_the_active_copies_of_an_adapter_are_routers(tiny_model_folder, null, ids, saved):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    with BHRoutingIntegration(model, alpha=0.5, kde=null):
        expected = logits(model, ids)
    settings = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved, r=2)
    adapted = peft.get_peft_model(model, settings).eval()
    before = state(adapted)
    routers = find_routers(adapted)
    assert len(routers) == 4
    assert all("modules_to_save.default" in router.name for router in routers)
    with BHRoutingIntegration(adapted, alpha=0.5, kde=null) as routing:
        torch.testing.assert_close(logits(adapted, ids), expected)
        assert [routing.counters.tokens(layer) for layer in range(4)] == [ids.numel()] * 4
        with adapted.disable_adapter():  # the original, which is routed too
            torch.testing.assert_close(logits(adapted, ids), expected)
        assert [routing.counters.tokens(layer) for layer in range(4)] == [2 * ids.numel()] * 4
    assert state(adapted) == before
    with adapted.disable_adapter():
        assert not any("modules_to_save" in router.name for router in find_routers(adapted))
