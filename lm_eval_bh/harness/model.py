"""``hf-bh``: the lm-eval model that routes by a statistical test."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from safetensors import SafetensorError
from torch import Tensor

from lm_eval_bh.errors import (
    BHError,
    ModelError,
    ParameterError,
    did_you_mean,
    show_as_one_sentence,
)
from lm_eval_bh.harness.arguments import routing_config
from lm_eval_bh.harness.cache_guard import CountingCache, guard
from lm_eval_bh.harness.logs.log_folder import check_writable
from lm_eval_bh.harness.logs.ownership import Owner
from lm_eval_bh.harness.logs.recorder import Expected, TokenIds
from lm_eval_bh.harness.logs.run_log import LogOptions, RunLog
from lm_eval_bh.resources import DEFAULT_MODEL, TINY_OLMOE, tiny_olmoe
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.nulls.null_model import NullModel
from lm_eval_bh.routing.patching.experts import EXPERTS
from lm_eval_bh.routing.patching.integration import BHRoutingIntegration
from lm_eval_bh.routing.placement import LM_EVAL_DEFAULT, placement
from lm_eval_bh.routing.rules.registry import RULES
from lm_eval_bh.schema import SCHEMA_VERSION, RunInfo

eval_logger = logging.getLogger(__name__)

# What HFLM hands on to from_pretrained; any other name it does not know is a misspelling.
FROM_PRETRAINED = frozenset(
    {
        "attn_implementation",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "cache_dir",
        "device_map",
        "force_download",
        "load_in_4bit",
        "load_in_8bit",
        "local_files_only",
        "low_cpu_mem_usage",
        "max_memory",
        "quantization_config",
        "token",
        "use_safetensors",
        "variant",
    }
)

# What the FLOPs of a forward pass are counted from.
FLOPS_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_experts",
    "num_experts_per_tok",
    "tie_word_embeddings",
)


class BHLM(HFLM):
    """A Hugging Face mixture-of-experts model whose routers ask a multiple-testing question.

    Everything that ``--model hf`` takes is taken too; see HFLM.

    Parameters
    ----------
    pretrained : str
        A hub name, a folder, or ``tiny-olmoe``, the model that ships.
    alpha, max_k, min_k, temperature, rule, mode, renormalize, layers, statistic, null, trim, seed
        See :class:`~lm_eval_bh.routing.config.RoutingConfig`. ``alpha`` is 0.4 unless given.
    target_experts, budget
        See there too: alpha is solved for this mean number of experts, and written to the results.
    kde : str
        ``auto``, or the path of a null model.
    experts : str
        What computes the experts, see
        :class:`~lm_eval_bh.routing.patching.integration.BHRoutingIntegration`.
    log_routing, log_dir, log_samples, log_logits
        See :class:`~lm_eval_bh.harness.logs.run_log.LogOptions`.

    Raises
    ------
    DataError
        If the logs cannot be written, before weights load.
    ParameterError
        If an argument is unknown, out of range or contradicts another one, before weights load.
    ModelError
        If the model cannot be loaded or has no routers.
    NullModelError
        If no null model serves it.
    """

    def __init__(
        self,
        pretrained: str | Any = DEFAULT_MODEL,
        *,
        alpha: float | None = None,
        max_k: int = 8,
        min_k: int | None = None,
        temperature: float = 1.0,
        rule: str = "bh",
        mode: str = "patch",
        kde: str | None = None,
        renormalize: str | bool = "auto",
        layers: str | int = "all",
        statistic: str = "logit",
        null: str = "pooled",
        trim: int | None = None,
        seed: int | None = None,
        target_experts: float | None = None,
        budget: str | None = None,
        experts: str = "auto",
        log_routing: str = "summary",
        log_dir: str | Path | None = None,
        log_samples: int | None = None,
        log_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_names(kwargs)
        self.routing_config = routing_config(
            alpha=alpha,
            max_k=max_k,
            min_k=min_k,
            temperature=temperature,
            rule=rule,
            mode=mode,
            renormalize=renormalize,
            layers=layers,
            statistic=statistic,
            null=null,
            trim=trim,
            seed=seed,
            target_experts=target_experts,
            budget=budget,
            kde=kde,
        )
        if kde not in (None, "auto") and not Path(str(kde)).exists():
            raise ParameterError(
                f"kde={str(kde)!r} is no file or folder: "
                "give the path of a null model, or kde=auto."
            )
        null_model: str | NullModel = kde or "auto"
        if Path(str(kde)).is_file():
            null_model = NullModel.load(str(kde))  # damaged files are found before weights load
        if experts not in EXPERTS:
            raise ParameterError(
                f"experts={experts!r} is unknown: choose one of {', '.join(EXPERTS)}."
            )
        options = LogOptions(
            log_routing, None if log_dir is None else str(log_dir), log_samples, log_logits
        )
        if options.details and kwargs.get("tp_plan"):
            raise ParameterError(
                f"log_routing={log_routing} does not work with tp_plan, whose processes do not "
                "know of each other here: use log_routing=summary."
            )
        if options.log_dir is not None:
            check_writable(Path(options.log_dir))
        kwargs |= placement(kwargs.get("device"), kwargs.get("dtype", "auto"), LM_EVAL_DEFAULT)
        name = (
            pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", "")
        )
        try:
            super().__init__(
                pretrained=str(tiny_olmoe()) if pretrained == TINY_OLMOE else pretrained, **kwargs
            )
        except BHError:
            raise
        except (OSError, SafetensorError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(
                f"The model {name!r} could not be loaded ({reason}): "
                "check its name and the network, "
                f"or use pretrained={TINY_OLMOE}, which ships and needs none."
            ) from error
        if hasattr(self, "accelerator"):
            # HFLM takes its rank from the accelerator only where there are several CUDA devices.
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
            self._device = self.accelerator.device
        self.integration = BHRoutingIntegration(
            self.model,
            collect_stats=False,
            kde=null_model,
            experts=experts,
            tokenizer=self.tokenizer,
            **self.routing_config.as_dict(),
        )
        self.integration.patch_model()
        self.log = RunLog(self.integration, options, self._new_run_id(), self.rank)
        self._name = name
        self._cache: CountingCache | None = None
        self._rolling: Iterator[tuple[int, int]] | None = None
        self._scored: dict[int, int] = {}
        self._prompts: dict[str, list[int]] = {}
        self._batch_prompts: list[str] = []

    def reroute(self, config: RoutingConfig, options: LogOptions) -> None:
        """Route another way, and begin the logs of another evaluation.

        Weights are not loaded again, nor is a null model that serves.

        Parameters
        ----------
        config : RoutingConfig
            How the experts are selected from now on.
        options : LogOptions
            What is logged from now on.

        Raises
        ------
        BHError
            If it does not fit the model; then the old routing stays in force.
        DataError
            If the logs cannot be written.
        """
        self.integration.configure(config)
        self.routing_config = config
        self.start_log(options)

    def start_log(self, options: LogOptions) -> None:
        """Begin the logs of another evaluation with the model as it is now routed.

        Raises
        ------
        DataError
            If the logs cannot be written.
        """
        self.log.detach()
        self.log = RunLog(self.integration, options, self._new_run_id(), self.rank)

    def _new_run_id(self) -> str:
        """Return an id that sorts by time and is the same on every process."""
        run_id = [f"{datetime.now():%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"]
        if self.world_size > 1:
            broadcast_object_list(run_id)
        return run_id[0]

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> BHLM:
        """Create the model from ``--model_args``, as lm-eval does."""
        return cls.create_from_arg_obj(
            utils.simple_parse_args_string(arg_string), additional_config
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> BHLM:
        """Create the model from a dictionary of arguments, as lm-eval does."""
        show_as_one_sentence()
        # lm-eval names the results folder after it.
        arg_dict.setdefault("pretrained", DEFAULT_MODEL)
        return super().create_from_arg_obj(arg_dict, additional_config)  # type: ignore[no-any-return]

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        config = self.config.get_text_config()
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            if isinstance(getattr(config, name, None), int):  # said before any weights are read
                self.routing_config.check_experts(getattr(config, name))
                self.routing_config.select_layers(config.num_hidden_layers)
                break
        super()._create_model(*args, **kwargs)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations, see HFLM."""
        with self._serving(requests):
            result: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
            self._log_losses([log_likelihood for log_likelihood, _ in result])
        return result

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole documents in windows, see HFLM."""
        with self._serving(requests):
            self._rolling = self._windows(requests)
            try:
                result: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self._rolling = None
            self._log_losses(result)
        return result

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate text, see HFLM; requests of other generation options after one another."""
        groups: dict[str, list[int]] = defaultdict(list)
        for position, request in enumerate(requests):
            groups[repr(request.args[1])].append(position)
        result = [""] * len(requests)
        with self._serving(requests):
            for positions in groups.values():  # HFLM would mix up their order
                self._prompts = defaultdict(list)
                for position in positions:
                    self._prompts[requests[position].args[0]].append(position)
                answers = super().generate_until([requests[p] for p in positions], disable_tqdm)
                for position, answer in zip(positions, answers, strict=True):
                    result[position] = answer
        return result

    @contextmanager
    def _serving(self, requests: list[Instance]) -> Iterator[None]:
        """Log what runs inside for these requests, and write the logs when it has ended."""
        if self.log.finished and self.world_size == 1:
            self.start_log(self.log.options)  # another evaluation with the same model
        self._scored = defaultdict(int)
        with self.log.recorder.serving(requests):
            yield
        self.log.flush()

    def barrier(self) -> None:
        """Wait for all processes, and bring their counters to the first one.

        lm-eval calls it on every process after every kind of request, even where a cache has
        answered them all.
        """
        super().barrier()
        self.log.cached_requests = 0 if self._cache is None else self._cache.hits
        self.log.collect(self.gather_object(self.log.state(), dst=0))

    def _log_losses(self, log_likelihoods: Sequence[float]) -> None:
        for position, value in enumerate(log_likelihoods):
            owner = self.log.recorder.owner(position)
            if owner is not None and self._scored[position]:  # an empty document scores nothing
                self.log.add_loss(owner, -value / self._scored[position])

    def _windows(self, requests: list[Instance]) -> Iterator[tuple[int, int]]:
        """Yield (position of the request, place of the window in it) as HFLM cuts documents."""
        for position, request in enumerate(requests):
            scored = 0
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, targets = utils.make_disjoint_window(window)
                yield position, scored - (len(context) - 1)  # the last window looks back
                scored += len(targets)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        with self.log.recorder.expecting(self._expected_rows(requests)):
            result: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, *args, **kwargs
            )
        return result

    def _expected_rows(self, requests: Sequence[Any]) -> Expected:
        """Return the rows that HFLM will make of tokenised requests, and who owns each."""
        places = [(position, 0) for position in range(len(requests))]
        if self._rolling is not None:
            # Windows come in order, batch by batch; copies that even out processes come last.
            places = list(islice(self._rolling, len(requests)))
            places += [(len(self._scored) + 10**9, 0)] * (len(requests) - len(places))
        rows: Expected = defaultdict(list)
        shared: dict[TokenIds, list[Owner]] = {}
        for (position, offset), (_, context, continuation) in zip(places, requests, strict=True):
            self._scored[position] += len(continuation)
            owner = self.log.recorder.owner(position, offset)
            tokens = tuple(context + continuation)
            owners = shared.get(tokens[:-1]) if self.logits_cache else None
            if owners is None:
                owners = shared[tokens[:-1]] = []
                rows[tokens[-(self.max_length + 1) :][:-1]].append(owners)
            if owner is not None:
                owners.append(owner)
        return rows

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        with self.log.recorder.expecting({}):  # probes are nobody's
            return int(super()._detect_batch_size(*args, **kwargs))

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self.log.recorder.forward(inps) as real:
            if self.peft:  # prompt tuning adds tokens of its own
                real = None
            with nullcontext() if real is None else self.integration.real_tokens(real):
                logits: Tensor = super()._model_call(inps, *args, **kwargs)
        return logits

    def tok_batch_encode(
        self, strings: list[str], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Tokenise a batch of prompts, see HFLM; remembers them for the generation that follows."""
        self._batch_prompts = list(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)  # type: ignore[no-any-return]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> Tensor:
        rows_a_prompt = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        if rows_a_prompt > 1:
            eval_logger.warning("Beams are not logged: their tokens belong to no single answer.")
            beams: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
            return beams
        owners: list[list[Owner]] = []
        for prompt in self._batch_prompts:
            waiting = self._prompts[prompt]
            owner = self.log.recorder.owner(waiting.pop(0)) if waiting else None
            owners.append([] if owner is None else [owner])
        mask = kwargs["attention_mask"]
        with self.log.recorder.generation(owners, context, mask) as generation:
            output: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
            generation.stop_clock(context.device)
            generation.fed = self._tokens_fed(output, context.shape[1], stop)
            generation.token_ids = output[:, context.shape[1] :]
        return output

    def _tokens_fed(self, output: Tensor, prompt_length: int, stop: list[str]) -> list[int]:
        """Return how many generated tokens each row was fed before it was finished.

        A row finishes with an end-of-text token or with the first of its stop sequences, but is run
        on until all rows of its batch have finished. HFLM's own criteria are replayed on the
        output.
        """
        criteria = stop_sequences_criteria(self.tokenizer, stop, prompt_length, output.shape[0])
        eos = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if eos is None else eos, device=output.device).reshape(-1)
        finished = torch.zeros(output.shape[0], dtype=torch.bool)
        fed = torch.zeros(output.shape[0], dtype=torch.int64)
        for length in range(prompt_length + 1, output.shape[1]):
            finished |= torch.isin(output[:, length - 1], ends).cpu()
            for criterion in criteria:
                criterion(output[:, :length], None)
                finished |= torch.tensor(criterion.done_tracker)
            fed += ~finished
        return fed.tolist()

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's request cache, unless it was filled under another routing."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            null = self.integration.null
            routing = self.integration.describe() | {
                "pretrained": self._name,
                "revision": self.revision,
                "peft": self.peft,
                "delta": self.delta,
                "max_length": self.max_length,
                "add_bos_token": self.add_bos_token,
                "dtype": str(self.model.dtype),
                "null_model": None if null is None else null.digest(),
            }
            self._cache = guard(cache_hook.dbdict, routing)

    def get_model_info(self) -> dict[str, Any]:
        """Return what HFLM tells about the model and, under ``bh``, the routing and its summary.

        lm-eval calls this once, on the first process, after the evaluation, and writes it into
        ``results["config"]``; so it is also where the logs are finished.
        """
        if self._cache is not None:
            self.log.cached_requests = self._cache.hits
        self.log.finish()
        info: dict[str, Any] = super().get_model_info()
        return info | {"bh": self._run_info()}

    def _run_info(self) -> RunInfo:
        integration, options = self.integration, self.log.options
        model_config = self.model.config.get_text_config().to_dict()
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.log.run_id,
            "rule": RULES[integration.config.rule].describe(),
            "config": integration.describe(),
            "experts": integration.experts,
            "log_routing": options.log_routing,
            "log_dir": options.log_dir,
            "routed_layers": integration.layers,
            "num_layers": len(integration.routers),
            "num_experts": integration.num_experts,
            "native_top_k": integration.routers[0].top_k,
            "model_config": {name: model_config.get(name) for name in FLOPS_FIELDS},
            "null_model": None
            if integration.null is None
            else dataclasses.asdict(integration.null.header),
            "summary": self.log.summary(),
        }


def _check_names(given: dict[str, Any]) -> None:
    known = {
        name
        for name in inspect.signature(HFLM.__init__).parameters
        if name not in ("self", "kwargs")
    }
    known |= {
        name
        for name in inspect.signature(BHLM.__init__).parameters
        if name not in ("self", "kwargs")
    }
    for name in given:
        if name not in known | FROM_PRETRAINED:
            raise ParameterError(
                f"The model argument {name!r} is unknown to hf-bh"
                f"{did_you_mean(name, known | FROM_PRETRAINED)}; "
                "README lists what --model_args takes."
            )
