"""A slow reference for the routing logs: each request alone, token by token, in plain Python."""

from __future__ import annotations

from collections import defaultdict

import torch
from lm_eval.models.huggingface import HFLM
from statsmodels.stats.multitest import multipletests

from lm_eval_bh import BHRoutingIntegration


class Reference:
    """Counts what Benjamini-Hochberg routing selects, from p-values, with statsmodels."""

    def __init__(self, lm: HFLM, null, alpha: float, max_k: int) -> None:
        self.lm = lm
        self.null = null
        self.alpha, self.max_k = alpha, max_k
        self.routing = BHRoutingIntegration(lm.model, alpha=alpha, max_k=max_k, kde=null)
        layers, experts = len(self.routing.routers), self.routing.num_experts
        self.histogram = defaultdict(lambda: [[0] * (experts + 1) for _ in range(layers)])
        self.usage = defaultdict(lambda: [[0] * experts for _ in range(layers)])
        self.cross = defaultdict(lambda: [0] * layers)
        self.losses = []  # (task, doc_id, request, position, loss in nats or None), once a token
        self.rows = []  # (task, doc_id, request, layer, position, token id, count, experts)

    def run(self, instances) -> Reference:
        for instance in instances:
            for position, tokens in self.inputs(instance):
                self.forward(instance, tokens, position)
        return self

    def inputs(self, instance):
        """Yield what the model is fed for a request: (position, token ids)."""
        lm, kind = self.lm, instance.request_type
        if kind == "loglikelihood":
            context, continuation = lm._encode_pair(*instance.args)
            yield 0, (context + continuation)[-(lm.max_length + 1) :][:-1]
        elif kind == "loglikelihood_rolling":
            document = [lm.prefix_token_id, *lm.tok_encode(instance.args[0])]
            end = 0
            while end < len(document) - 1:  # the last window is filled up with what came before
                end = min(end + lm.max_length, len(document) - 1)
                start = max(0, end - lm.max_length)
                yield start, document[start:end]
        else:
            yield 0, self.generate(instance)

    def generate(self, instance):
        """Generate alone, token by token, and stop as soon as a stop sequence is there."""
        prompt, options = instance.args
        ids = self.lm.tok_encode(prompt)[-(self.lm.max_length - options["max_gen_toks"]) :]
        generated: list[int] = []
        with self.routing, torch.no_grad():
            for _ in range(options["max_gen_toks"]):
                logits = self.lm.model(torch.tensor([ids + generated])).logits
                generated.append(int(logits[0, -1].argmax()))
                text = self.lm.tokenizer.decode(generated)
                if generated[-1] == self.lm.eot_token_id or any(
                    s in text for s in options["until"]
                ):
                    break
        return ids + generated[:-1]

    def forward(self, instance, tokens, start):
        task, key = instance.task_name, (instance.doc_id, instance.idx)
        with self.routing, torch.no_grad():
            output = self.lm.model(torch.tensor([tokens]), output_router_logits=True)
        router_logits = output.router_logits
        scores = output.logits[0].log_softmax(-1)
        for place, token in enumerate(tokens):
            known = place > 0 and instance.request_type != "generate_until"
            loss = -float(scores[place - 1, token]) if known else None
            self.losses.append((task, *key, start + place, loss))
        before = None
        for layer, logits in enumerate(router_logits):
            p_values = self.null.p_values(layer, logits).numpy()
            counts = []
            for token, row in enumerate(p_values):
                rejected = int(multipletests(row, alpha=self.alpha, method="fdr_bh")[0].sum())
                count = min(max(rejected, 1), self.max_k)
                chosen = logits[token].argsort(descending=True)[:count].tolist()
                self.histogram[task][layer][count] += 1
                for expert in chosen:
                    self.usage[task][layer][expert] += 1
                counts.append(count)
                self.rows.append(
                    (task, *key, layer, start + token, tokens[token], count, tuple(chosen))
                )
            if before is not None:
                self.cross[task][layer] += sum(a * b for a, b in zip(counts, before, strict=True))
            before = counts
