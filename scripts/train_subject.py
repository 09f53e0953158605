r"""Train tiny-olmoe and tiny-glm, the small but real shipped models, on WikiText-2.

Their architectures are those of OLMoE (a softmax router, ``norm_topk_prob=False``) and of GLM-4.5
(sigmoid scores, a correction bias on the choice, rescaled weights times 1.8, one shared expert),
scaled down until the weights fit into a few megabytes: 64 experts, top-8. An OLMoE's loads are
balanced by its load-balancing and router z-losses (Muennighoff et al. 2024, "OLMoE: Open
Mixture-of-Experts Language Models"), a GLM's without gradients, by its correction bias (Wang et al.
2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts").

    python scripts/train_subject.py --output tiny-olmoe            # from a fixed seed
    python scripts/train_subject.py --output tiny-olmoe --resume   # after an interruption
    python scripts/train_subject.py --output tiny-glm --family glm4_moe \
        --tokenizer lm_eval_bh/models/tiny-olmoe

Other subjects of the recipe, which are not shipped, show whether a result holds beyond one model:

    python scripts/train_subject.py --output another --seed 7
    python scripts/train_subject.py --output renormalised --experts 32 --top-k 4 --norm-topk-prob

The text is WikiText-2's training split. Its full word-level form writes rare words as ``<unk>``,
which never occurs in the raw text used for evaluation. So articles that are in the raw training
split are used raw, and in the others every ``<unk>`` is replaced, again in every epoch, by a rare
word from those raw articles: the model learns where rare words occur without ever learning the
token.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import torch.nn.functional as F
import typer
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

DATASET = "EleutherAI/wikitext_document_level"
EOS, PAD = "<|endoftext|>", "<|padding|>"
UNK = "<unk>"
Z_LOSS = 1e-3
BIAS_STEP = 3e-3  # a tenth of it in the last fifth of training, so that loads settle


class Family(StrEnum):
    """Architectures that a subject can have, by transformers' names."""

    OLMOE = "olmoe"
    GLM4_MOE = "glm4_moe"


def load_articles() -> tuple[list[str], list[str], list[str]]:
    """Return (training articles, rare words, raw validation articles), all still tokenised."""
    word_level = datasets.load_dataset(DATASET, "wikitext-2-v1", split="train")["page"]
    raw = {
        page[:60]: page
        for page in datasets.load_dataset(DATASET, "wikitext-2-raw-v1", split="train")["page"]
    }
    articles: list[str] = []
    rare_words: list[str] = []
    for page in word_level:
        twin = raw.get(page[:60])
        words, raw_words = page.split(), (twin or "").split()
        if twin is not None and len(words) == len(raw_words):
            rare_words += [r for w, r in zip(words, raw_words, strict=True) if w == UNK]
            articles.append(twin)
        else:
            articles.append(page)
    validation = datasets.load_dataset(DATASET, "wikitext-2-raw-v1", split="validation")["page"]
    return articles, rare_words, list(validation)


def epoch_texts(articles: list[str], rare_words: list[str], rng: random.Random) -> list[str]:
    """Shuffle the articles, replace each ``<unk>`` by a rare word, undo the tokenisation."""
    texts = []
    for page in rng.sample(articles, len(articles)):
        parts = page.split(UNK)
        filled = "".join(p + rng.choice(rare_words) for p in parts[:-1]) + parts[-1]
        texts.append(wikitext_detokenizer({"page": filled}))
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer: every text has tokens, no unknown token exists."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def wrapped(tokenizer: Tokenizer, length: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer as transformers saves it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=length,
    )


def batches(
    tokenizer: PreTrainedTokenizerFast,
    articles: list[str],
    rare_words: list[str],
    *,
    seed: int,
    batch: int,
    length: int,
) -> Iterator[torch.Tensor]:
    """Yield int64 [batch, length + 1] windows of the concatenated documents, epoch after epoch."""
    epoch = 0
    while True:
        rng = random.Random(f"{seed}/{epoch}")
        ids: list[int] = []
        for encoded in tokenizer(epoch_texts(articles, rare_words, rng))["input_ids"]:
            ids += [tokenizer.eos_token_id, *encoded]
        ids = ids[rng.randrange(length) :]
        rows = torch.tensor(ids[: (len(ids) - 1) // length * length + 1]).unfold(
            0, length + 1, length
        )
        order = torch.tensor(rng.sample(range(len(rows)), len(rows)))
        yield from rows[order].split(batch)[:-1]
        epoch += 1


class GroupedExperts(torch.autograd.Function):
    """The experts' forward and backward, one matrix product per expert on sorted rows.

    Same mathematics as the stock implementations, made for training on a CPU. They differentiate
    row gathering with an accumulating ``index_put``, the largest single cost there; since every
    token has exactly K rows, here both directions are a gather and a sum over K. Each expert's rows
    are padded with zero rows to a multiple of 64, because oneDNN compiles a kernel for every new
    bfloat16 shape.
    """

    @staticmethod
    def forward(ctx: Any, h: Any, index: Any, weight: Any, gate_up: Any, down: Any) -> torch.Tensor:
        tokens, k = index.shape
        flat = index.reshape(-1)
        counts = torch.bincount(flat, minlength=gate_up.shape[0])
        padded = (counts + 63) // 64 * 64
        ends = padded.cumsum(0)
        spans = [
            (e, b - n, b)
            for e, (b, n) in enumerate(zip(ends.tolist(), padded.tolist(), strict=True))
            if n
        ]
        order = flat.argsort(stable=True)
        shift = (ends - padded) - (counts.cumsum(0) - counts)
        slot = torch.empty_like(order)
        slot[order] = torch.arange(order.numel(), device=order.device) + shift[flat[order]]
        token = torch.full((int(ends[-1]),), tokens, device=order.device)
        token[slot] = torch.arange(order.numel(), device=order.device) // k
        dtype = (
            torch.get_autocast_dtype(h.device.type)
            if torch.is_autocast_enabled(h.device.type)
            else h.dtype
        )
        gate_up, down = gate_up.to(dtype), down.to(dtype)
        rows = F.pad(h.to(dtype), (0, 0, 0, 1))[token]
        up = rows.new_empty(len(rows), gate_up.shape[1])
        for e, a, b in spans:
            torch.mm(rows[a:b], gate_up[e].T, out=up[a:b])
        gate, value = up.chunk(2, -1)
        hidden = F.silu(gate) * value
        out = rows.new_empty(len(rows), rows.shape[1])
        for e, a, b in spans:
            torch.mm(hidden[a:b], down[e].T, out=out[a:b])
        out = out[slot].view(tokens, k, -1)
        ctx.save_for_backward(rows, up, hidden, out, token, slot, weight, gate_up, down)
        ctx.spans = spans
        return torch.bmm(weight.to(dtype).unsqueeze(1), out).squeeze(1).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        rows, up, hidden, out, token, slot, weight, gate_up, down = ctx.saved_tensors
        grad_weight = torch.bmm(out, grad.to(out.dtype).unsqueeze(-1)).squeeze(-1).to(weight.dtype)
        row_weight = rows.new_zeros(len(rows), 1)
        row_weight[slot] = weight.reshape(-1, 1).to(rows.dtype)
        grad_out = F.pad(grad.to(rows.dtype), (0, 0, 0, 1))[token] * row_weight
        grad_hidden = torch.empty_like(hidden)
        grad_down = torch.zeros_like(down)
        for e, a, b in ctx.spans:
            torch.mm(grad_out[a:b], down[e], out=grad_hidden[a:b])
            torch.mm(grad_out[a:b].T, hidden[a:b], out=grad_down[e])
        gate, value = up.chunk(2, -1)
        sigmoid = gate.sigmoid()
        grad_gate = grad_hidden * value * sigmoid * (1 + gate * (1 - sigmoid))
        grad_up = torch.cat([grad_gate, grad_hidden * gate * sigmoid], -1)
        grad_gate_up = torch.zeros_like(gate_up)
        grad_in = torch.empty_like(rows)
        for e, a, b in ctx.spans:
            torch.mm(grad_up[a:b], gate_up[e], out=grad_in[a:b])
            torch.mm(grad_up[a:b].T, rows[a:b], out=grad_gate_up[e])
        grad_h = grad_in[slot].view(*weight.shape, -1).sum(1, dtype=torch.float32)
        return grad_h.to(grad.dtype), None, grad_weight, grad_gate_up.float(), grad_down.float()


def grouped_experts(
    module: Any, h: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Adapt :class:`GroupedExperts` to the signature of transformers' expert functions."""
    return GroupedExperts.apply(h, index, weight, module.gate_up_proj, module.down_proj)


class Loads:
    """The number of tokens routed to each expert, ``[layers, experts]``."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.gates = [block.mlp.gate for block in model.model.layers]
        self.counts = torch.zeros(len(self.gates), len(self.gates[0].weight), device=model.device)
        for layer, gate in enumerate(self.gates):
            gate.register_forward_hook(partial(self._add, layer))

    def _add(self, layer: int, gate: Any, args: Any, output: Any) -> None:
        self.counts[layer] += torch.bincount(output[2].flatten(), minlength=self.counts.shape[1])

    def take(self) -> torch.Tensor:
        """Return the loads since the last call."""
        taken, self.counts = self.counts, torch.zeros_like(self.counts)
        return taken

    @torch.no_grad()
    def move_biases(self, loads: torch.Tensor, step: float) -> None:
        """Make experts below the mean load likelier to be chosen, and others less likely."""
        for gate, load in zip(self.gates, loads, strict=True):
            gate.e_score_correction_bias += step * (load.mean() - load).sign()


def olmoe(*, experts: int, intermediate: int, **settings: Any) -> OlmoeForCausalLM:
    """Return an OLMoE with random weights; ``settings`` are those of its configuration."""
    config = OlmoeConfig(num_experts=experts, intermediate_size=intermediate, **settings)
    model = OlmoeForCausalLM(config)
    for block in model.model.layers:  # zero-initialised routers make a token's experts all equal
        nn.init.normal_(block.mlp.gate.weight, std=config.initializer_range)
    return model


def glm4_moe(*, experts: int, intermediate: int, **settings: Any) -> Glm4MoeForCausalLM:
    """Return a GLM-4.5 with random weights, in which all layers are sparse."""
    config = Glm4MoeConfig(
        n_routed_experts=experts,
        moe_intermediate_size=intermediate,
        intermediate_size=intermediate,  # of dense layers, of which it has none
        first_k_dense_replace=0,
        n_shared_experts=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.8,
        num_key_value_heads=settings["num_attention_heads"],
        use_qk_norm=True,
        num_mtp_layers=0,
        **settings,
    )
    return Glm4MoeForCausalLM(config)


def olmoe_router_loss(router_logits: tuple[torch.Tensor, ...], config: Any) -> torch.Tensor:
    """Return the mean over layers of load-balancing loss + z-loss, balanced in every layer."""
    balance = sum(
        load_balancing_loss_func((r.float(),), config.num_experts, config.num_experts_per_tok)
        for r in router_logits
    )
    z = sum(r.float().logsumexp(-1).square().mean() for r in router_logits)
    return (config.router_aux_loss_coef * balance + Z_LOSS * z) / len(router_logits)


def language_loss(logits: torch.Tensor, window: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return the mean loss of a window's next tokens, or as ``reduction`` says."""
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten(), **options)


@torch.no_grad()
def validate(
    model: PreTrainedModel, loads: Loads, windows: torch.Tensor, text_bytes: int
) -> dict[str, Any]:
    """Return losses on the raw validation text, and each layer's dead experts and largest load."""
    model.eval()
    total = 0.0
    for window in windows.split(8):
        logits = model(input_ids=window[:, :-1]).logits
        total += float(language_loss(logits, window, reduction="sum"))
    model.train()
    found = loads.take()
    return {
        "validation_loss": total / windows[:, 1:].numel(),
        "validation_byte_perplexity": math.exp(total / text_bytes),
        "dead_experts": (found == 0).sum(1).tolist(),
        "largest_load_over_mean": [round(x, 2) for x in (found.amax(1) / found.mean(1)).tolist()],
    }


def optimizer_for(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def learning_rate(step: int, steps: int, *, horizon: float, cooldown: float) -> float:
    """Return the rate, relative to its peak: warm-up, a cosine, and a linear fall at the end.

    The fall lets a run end well before the cosine does (Hu et al. 2024, "MiniCPM").
    """
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / horizon)))
    return min((step + 1) / 100, cosine) * min(1.0, (steps - step) / cooldown)


def main(
    output: Annotated[
        Path, typer.Option(help="Folder for the model, its tokenizer and train.json.")
    ],
    family: Family = Family.OLMOE,
    tokenizer_folder: Annotated[
        Path | None,
        typer.Option("--tokenizer", help="Folder of a tokenizer; else one is trained on the text."),
    ] = None,
    tokens: Annotated[float, typer.Option(help="Training tokens, in millions.")] = 7.2,
    horizon: Annotated[
        float, typer.Option(help="Millions of tokens of a whole cosine schedule.")
    ] = 10.0,
    cooldown: Annotated[
        float, typer.Option(help="Last millions of tokens, in which the rate falls.")
    ] = 1.0,
    hidden: int = 128,
    intermediate: int = 32,
    layers: int = 4,
    experts: Annotated[int, typer.Option(help="Experts of a layer.")] = 64,
    top_k: Annotated[int, typer.Option(help="Experts of a token, in training too.")] = 8,
    norm_topk_prob: Annotated[
        bool,
        typer.Option(help="Whether an OLMoE's selected experts' weights are made to sum to 1."),
    ] = False,
    vocab: Annotated[int, typer.Option(help="Tokens of a tokenizer that is trained.")] = 4096,
    length: Annotated[int, typer.Option(help="Window length in tokens.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 8,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    seed: int = 20240902,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    resume: bool = False,
) -> None:
    """Train a subject and write it, as bfloat16 safetensors, with its tokenizer."""
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    articles, rare_words, validation = load_articles()
    if tokenizer_folder is None:
        texts = epoch_texts(articles, rare_words, random.Random(f"{seed}/bpe"))
        bpe = train_tokenizer(texts, vocab)
    else:
        bpe = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer = wrapped(bpe, length)
    held_out = [tokenizer.eos_token_id]
    for page in validation:
        held_out += [
            *tokenizer(wikitext_detokenizer({"page": page}))["input_ids"],
            tokenizer.eos_token_id,
        ]
    windows = (
        torch.tensor(held_out[: (len(held_out) - 1) // length * length + 1])
        .unfold(0, length + 1, length)
        .to(device)
    )
    seen = windows[:, 1:].numel() / (len(held_out) - 1)
    text_bytes = round(seen * sum(len(page.encode()) for page in validation))

    settings: dict[str, Any] = {
        "experts": experts,
        "intermediate": intermediate,
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_experts_per_tok": top_k,
        "tie_word_embeddings": True,
        "max_position_embeddings": length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family is Family.OLMOE:
        model = olmoe(norm_topk_prob=norm_topk_prob, **settings)
    else:
        model = glm4_moe(**settings)
        for block in model.model.layers:
            # bfloat16 cannot resolve scores that differ by less than a step of the bias.
            gate = block.mlp.gate
            gate.forward = torch.autocast(device, enabled=False)(gate.forward)
    model = model.to(device).train()
    loads = Loads(model)
    ALL_EXPERTS_FUNCTIONS.register("grouped_experts", grouped_experts)
    model.set_experts_implementation("grouped_experts")

    steps = round(tokens * 1e6 / (batch * length))
    optimizer = optimizer_for(model, rate)
    per_step = batch * length
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate(
            step, steps, horizon=round(horizon * 1e6 / per_step), cooldown=cooldown * 1e6 / per_step
        ),
    )
    state, first = output / "checkpoint.pt", 0
    log: list[dict[str, Any]] = []
    if resume and state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first, log = saved["step"], saved["log"]
    stream = batches(tokenizer, articles, rare_words, seed=seed, batch=batch, length=length)
    start = time.monotonic()
    recent: list[float] = []
    for step, window in zip(range(steps), stream, strict=False):
        if step < first:
            continue
        window = window.to(device)
        with torch.autocast(device, torch.bfloat16):
            out = model(input_ids=window[:, :-1], output_router_logits=family is Family.OLMOE)
            loss = objective = language_loss(out.logits, window)
            if family is Family.OLMOE:
                objective = loss + olmoe_router_loss(out.router_logits, model.config)
        objective.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        served = loads.take()
        if family is Family.GLM4_MOE:
            loads.move_biases(served, BIAS_STEP if step < 0.8 * steps else BIAS_STEP / 10)
        recent.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            found = validate(model, loads, windows, text_bytes)
            speed = (step + 1 - first) * batch * length / (time.monotonic() - start)
            entry = {
                "step": step + 1,
                "tokens": (step + 1) * batch * length,
                "train_loss": sum(recent) / len(recent),
                **found,
            }
            log.append(entry)
            recent.clear()
            print(json.dumps(entry), f"{speed:.0f} tokens/s", flush=True)
            saved = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
                "log": log,
            }
            torch.save(saved, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)

    model.set_experts_implementation("eager")
    model.eval()
    for parameter in model.parameters():  # a correction bias is a buffer, and stays in float32
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(output)
    # Half the bytes on disk; at this size CPUs compute fastest in float32.
    saved_config = json.loads((output / "config.json").read_text())
    saved_config["dtype"] = "float32"
    (output / "config.json").write_text(json.dumps(saved_config, indent=2) + "\n")
    tokenizer.save_pretrained(output)
    (output / "train.json").write_text(
        json.dumps({"seed": seed, "steps": steps, "log": log}, indent=1) + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
