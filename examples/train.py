"""Fine-tune a mixture-of-experts model with adaptive expert selection.

    python examples/train.py --steps 300 --alpha 0.4 --output runs/trained
    python examples/train.py --steps 300 --policy policy.safetensors   # the routing of the file
    python examples/train.py --steps 300 --lora-rank 8                 # only adapters are trained

The patched model is trained by transformers' Trainer. Training moves router logits away from the
null model behind the p-values, so the null model is fitted again on the training text every
``--recalibrate-every`` steps, and once more at the end; a target is then also solved again.
Perplexity and experts per token are measured on held-out text, before and after, under the model's
own top-k and under the rule. The result can be evaluated by

    lm_eval --model hf-bh --model_args pretrained=OUTPUT,policy=OUTPUT/policy.safetensors ...

or, where adapters were trained, with ``pretrained=MODEL,peft=OUTPUT,policy=...``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lm_eval_bh import BHRoutingIntegration, RoutingConfig
from lm_eval_bh.resources import model_path
from lm_eval_bh.routing.routers import find_routers, transformers_model
from lm_eval_bh.routing.tables.calibration import calibrate
from lm_eval_bh.routing.tables.texts import text_batches, wikitext_texts


@dataclass(frozen=True)
class Measured:
    """Held-out perplexity per token, and experts per token and layer."""

    perplexity: float
    experts: float


def measure(model: nn.Module, routing: BHRoutingIntegration, windows: Sequence[Tensor]) -> Measured:
    """Run a model with a routing over windows of token ids, int64 [rows, length]."""
    model.eval()
    loss, tokens = 0.0, 0
    with routing, torch.no_grad():
        routing.reset_stats()
        for ids in windows:
            ids = ids.to(model.device)
            predicted = ids[:, 1:].numel()
            loss += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * predicted
            tokens += predicted
        experts = routing.get_routing_stats()["mean_experts_per_token"]
    return Measured(math.exp(loss / tokens), experts)


class Recalibrate(TrainerCallback):
    """Keeps a model patched during training, and its null model fitted to its routers.

    Parameters
    ----------
    routing : BHRoutingIntegration
        The integration at the start of training.
    refit : callable
        Returns an unpatched integration of the current model, with a new null model.
    every : int
        Steps between fits; 0 for never.
    """

    def __init__(
        self, routing: BHRoutingIntegration, refit: Callable[[], BHRoutingIntegration], every: int
    ) -> None:
        self.routing = routing
        self.refit = refit
        self.every = every

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Patch the model."""
        self.routing.patch_model()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fit again between two steps, when no pass is running."""
        if self.every and state.global_step % self.every == 0:
            self.routing.unpatch_model()
            self.routing = self.refit().patch_model()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Unpatch the model, and fit a final null model."""
        self.routing.unpatch_model()
        self.routing = self.refit()


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Return the model with LoRA adapters on its attention; only these are trained.

    Routers and experts stay unchanged, but the routers' input changes.
    """
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=targets))


def main(
    output: Annotated[Path, typer.Option(help="Folder for the model and its policy.")] = Path(
        "runs/trained"
    ),
    pretrained: Annotated[
        str, typer.Option(help="Hub name or folder of the model, or tiny-olmoe.")
    ] = "tiny-olmoe",
    alpha: Annotated[float, typer.Option(help="Level of Benjamini-Hochberg.")] = 0.4,
    max_k: Annotated[int, typer.Option(help="Most experts of a token.")] = 8,
    policy: Annotated[
        Path | None, typer.Option(help="A policy file in place of these two.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Train adapters of this rank; 0 for all.")] = 0,
    steps: int = 300,
    recalibrate_every: Annotated[
        int, typer.Option(help="Steps between fits of the null model; 0: only at the end.")
    ] = 50,
    calibration_tokens: Annotated[int, typer.Option(help="Of a fit.")] = 16384,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 8,
    length: Annotated[int, typer.Option(help="Window length in tokens.")] = 256,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    train_text: Annotated[
        Path | None, typer.Option(help="Text file; default: WikiText-2's training split.")
    ] = None,
    held_out_text: Annotated[
        Path | None, typer.Option(help="Text file; default: WikiText-2's validation split.")
    ] = None,
    held_out_tokens: int = 65536,
    seed: int = 0,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda; default: cuda if any.")] = None,
) -> dict[str, Measured]:
    """Fine-tune, measure before and after, and write the model with its policy."""
    path = model_path(pretrained)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).to(device)
    texts = [train_text.read_text()] if train_text else wikitext_texts("train")
    held_out = [held_out_text.read_text()] if held_out_text else wikitext_texts("validation")

    def windows(documents: list[str], tokens: int, rows: int) -> list[Tensor]:
        found = text_batches(tokenizer, documents, tokens=tokens, length=length, batch=rows)
        return [ids for ids in found if ids.shape[1] == length]

    held_out_windows = windows(held_out, held_out_tokens, batch)
    if lora_rank:
        model = with_adapters(model, lora_rank)
    if policy is None:
        routing = BHRoutingIntegration(model, alpha=alpha, max_k=max_k, tokenizer=tokenizer)
    else:
        routing = BHRoutingIntegration(model, policy=policy)
    config = routing.config
    own = RoutingConfig(rule="topk", max_k=routing.routers[0].top_k)

    def refit() -> BHRoutingIntegration:
        fitted: Any = "auto"
        if config.needs_null:
            fitted = calibrate(
                model,
                tokenizer,
                [router.module for router in find_routers(model)],
                texts,
                tokens=calibration_tokens,
                length=length,
                batch=batch,
                model_name=transformers_model(model).name_or_path,
                revision=None,
                text_name=str(train_text or "WikiText-2 train"),
                kind=config.null_kind.made(),
                progress=False,
            )
        return BHRoutingIntegration(
            model, config=config, null_model=fitted, tokenizer=tokenizer, texts=texts
        )

    def both(routing: BHRoutingIntegration) -> tuple[Measured, Measured]:
        stock = BHRoutingIntegration(model, config=own)
        return measure(model, stock, held_out_windows), measure(model, routing, held_out_windows)

    found: dict[str, Measured] = {}
    found["before, top-k"], found["before, routed"] = both(routing)
    tokens = steps * batch * length
    data = [{"input_ids": ids[0], "labels": ids[0]} for ids in windows(texts, tokens, 1)]
    schedule = Recalibrate(routing, refit, recalibrate_every)
    Trainer(
        model,
        TrainingArguments(
            str(output),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, steps // 10),
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
            use_cpu=device == "cpu",
            seed=seed,
        ),
        train_dataset=data,
        callbacks=[schedule],
    ).train()
    found["after, top-k"], found["after, routed"] = both(schedule.routing)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    schedule.routing.policy(trained_steps=steps).save(output / "policy.safetensors")
    print("| | perplexity | experts a token |\n|---|---:|---:|")
    for name, each in found.items():
        print(f"| {name} | {each.perplexity:.2f} | {each.experts:.2f} |")
    print(f"Written to {output}")
    return found


if __name__ == "__main__":
    typer.run(main)
