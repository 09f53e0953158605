"""``hf-bh``: the lm-eval model that routes by a statistical test."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from lm_eval_bh.errors import (
    BHError,
    ModelError,
    ParameterError,
    show_as_one_sentence,
)
from lm_eval_bh.harness.arguments import routing_config
from lm_eval_bh.harness.cache_guard import guard
from lm_eval_bh.harness.decode_batches import decode_batches
from lm_eval_bh.harness.logs.expected_rows import ExpectedRows, window_places
from lm_eval_bh.harness.logs.log_folder import check_writable
from lm_eval_bh.harness.logs.log_options import LogOptions
from lm_eval_bh.harness.logs.run_info import run_info
from lm_eval_bh.harness.logs.run_log import RunLog, new_run_id
from lm_eval_bh.harness.logs.served_requests import ServedRequests
from lm_eval_bh.harness.plugin.evaluation_start import announce_evaluations
from lm_eval_bh.harness.preflight import (
    check_model_config,
    check_names,
    check_routes,
    given_null_model,
    say_download,
)
from lm_eval_bh.harness.quantized import take_quantization
from lm_eval_bh.resources import DEFAULT_MODEL, TINY_OLMOE, model_path
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.declared import PARAMETERS
from lm_eval_bh.routing.parameters import ALIASES, accepts
from lm_eval_bh.routing.patching.experts_switch import check_implementation
from lm_eval_bh.routing.patching.forward_pass import ending_with
from lm_eval_bh.routing.patching.integration import BHRoutingIntegration
from lm_eval_bh.routing.placement import LM_EVAL_DEFAULT, placement
from lm_eval_bh.routing.policy import Policy, beside_policy

logger = logging.getLogger(__name__)


class BHLM(HFLM):
    """A Hugging Face mixture-of-experts model routed by a method of this package.

    It takes all arguments of ``--model hf`` too; see HFLM.

    Parameters
    ----------
    pretrained : str
        A hub name, a folder, or a shipped model: ``tiny-olmoe`` or ``tiny-glm``.
    policy : path
        A policy file, in place of all routing parameters.
    null_model : str
        ``auto``, or the path of a null model; ``kde=`` is an alias.
    experts_implementation : str
        The experts implementation, see
        :class:`~lm_eval_bh.routing.patching.integration.BHRoutingIntegration`; ``experts=`` is an
        alias.
    log_routing, log_dir, log_samples, log_logits
        See :class:`~lm_eval_bh.harness.logs.log_options.LogOptions`.
    **kwargs
        Parameters of :class:`~lm_eval_bh.routing.config.RoutingConfig`, where ``alpha`` is 0.4 by
        default; all others are HFLM's.

    Raises
    ------
    DataError
        If the logs cannot be written, before weights load.
    ParameterError
        If an argument is unknown, out of range or contradicts another one, before weights load.
    ModelError
        If the model cannot be loaded or has no routers.
    NullModelError
        If no null model fits it.
    """

    @accepts(ALIASES)
    def __init__(
        self,
        pretrained: str | Any = DEFAULT_MODEL,
        *,
        policy: str | Path | None = None,
        null_model: str | None = None,
        experts_implementation: str = "auto",
        log_routing: str = "summary",
        log_dir: str | Path | None = None,
        log_samples: int | None = None,
        log_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        check_names(kwargs)
        parameters = {name: kwargs.pop(name) for name in PARAMETERS if name in kwargs}
        loaded = None
        if policy is not None:
            given = parameters | {"null_model": null_model}
            loaded = beside_policy(Policy.load(policy), given)
            self.routing_config = loaded.config
        else:
            self.routing_config = routing_config(parameters | {"null_model": null_model})
        check_routes(self.routing_config)
        given_null = given_null_model(null_model)
        check_implementation(experts_implementation)
        options = LogOptions(
            log_routing, None if log_dir is None else str(log_dir), log_samples, log_logits
        )
        if options.details and kwargs.get("tp_plan"):
            raise ParameterError(
                f"log_routing={log_routing} does not work with tp_plan, whose processes cannot "
                "coordinate here: use log_routing=summary."
            )
        if options.log_dir is not None:
            check_writable(Path(options.log_dir))
        self._quantization = take_quantization(kwargs)
        kwargs |= placement(kwargs.get("device"), kwargs.get("dtype", "auto"), LM_EVAL_DEFAULT)
        name = (
            pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", "")
        )
        say_download(pretrained)
        try:
            super().__init__(
                pretrained=model_path(pretrained) if isinstance(pretrained, str) else pretrained,
                **kwargs,
            )
        except BHError:
            raise
        except (ImportError, OSError, SafetensorError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(
                f"The model {name!r} could not be loaded ({reason}): "
                "check its name and the network, "
                f"or use pretrained={TINY_OLMOE}, which needs no download."
            ) from error
        if hasattr(self, "accelerator"):
            # HFLM takes its rank from the accelerator only with several CUDA devices.
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
            self._device = self.accelerator.device
        self.integration = BHRoutingIntegration(
            self.model,
            policy=loaded,
            config=None if loaded else self.routing_config,
            collect_stats=False,
            null_model=given_null,
            experts_implementation=experts_implementation,
            tokenizer=self.tokenizer,
        )
        self.integration.patch_model()
        self._own = self.integration
        self._name = name
        self._warm: set[tuple[torch.device, torch.dtype]] = set()
        self.log = RunLog(self.integration, options, new_run_id(self.world_size), self.rank)
        announce_evaluations()

    def reroute(self, config: RoutingConfig | Policy, options: LogOptions) -> None:
        """Change the routing, and start the logs of another evaluation.

        Weights are not loaded again, nor is a null model that still fits.

        Parameters
        ----------
        config : RoutingConfig or Policy
            The new routing.
        options : LogOptions
            The new log options.

        Raises
        ------
        BHError
            If the routing does not fit the model; then the old one stays in force.
        DataError
            If the logs cannot be written.
        """
        if isinstance(config, Policy):
            before = self.integration
            before.unpatch_model()
            try:
                self.integration = BHRoutingIntegration(
                    self.model,
                    policy=config,
                    collect_stats=False,
                    experts_implementation=self._own.experts_implementation,
                    tokenizer=self.tokenizer,
                )
                self.integration.patch_model()
            except BaseException:
                self.integration = before
                before.patch_model()
                raise
            self.routing_config = config.config
        else:
            self._own.configure(config)
            if self.integration is not self._own:
                self.integration.unpatch_model()
                self.integration = self._own
                self._own.patch_model()
            self.routing_config = config
        self.start_log(options)

    def start_log(self, options: LogOptions) -> None:
        """Start the logs of another evaluation; all processes must do so together.

        Raises
        ------
        DataError
            If the logs cannot be written.
        """
        if options.log_dir is not None:
            check_writable(Path(options.log_dir))
        self.log.detach()
        self.log = RunLog(self.integration, options, new_run_id(self.world_size), self.rank)

    def begin_evaluation(self) -> None:
        """Start the logs of another evaluation; lm-eval's evaluator calls it on every process.

        The logs of an earlier evaluation stay separate, finished or not.
        """
        config = self.routing_config
        if config.method.joint and config.decode_batch is None and self.rank == 0:
            logger.warning(
                "rule=%s decides for the rows that are decoded together, and without decode_batch "
                "these are the rows of a pass: its results depend on --batch_size. Give "
                "decode_batch=32, say.",
                config.rule,
            )
        self.start_log(self.log.options)

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
        for name, value in (additional_config or {}).items():
            if value is not None and name in arg_dict:
                raise ParameterError(
                    f"{name} is given twice, as {arg_dict[name]} in --model_args and as {value} by "
                    f"--{name}: leave it out of --model_args."
                )
        # lm-eval names the results folder after this.
        arg_dict.setdefault("pretrained", DEFAULT_MODEL)
        return super().create_from_arg_obj(arg_dict, additional_config)  # type: ignore[no-any-return]

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        check_model_config(self.config, self.routing_config)  # before any weights are read
        if self._quantization is not None:  # HFLM only knows quantization from the model's files
            kwargs["quantization_config"] = self._quantization
        super()._create_model(*args, **kwargs)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations, see HFLM."""
        with self._serving(requests):
            result: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
            self.log.add_losses(log_likelihood for log_likelihood, _ in result)
        return result

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole documents in windows, see HFLM."""
        with self._serving(requests) as served:
            documents = (self.tok_encode(request.args[0]) for request in requests)
            served.expect_windows(window_places(documents, self.prefix_token_id, self.max_length))
            grouped = self.routing_config.decode_batch is not None
            with self._passes_of(sys.maxsize) if grouped else nullcontext():
                result: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
            self.log.add_losses(result)
        return result

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate text, see HFLM; requests are grouped by generation options."""
        groups: dict[str, list[int]] = defaultdict(list)
        for position, request in enumerate(requests):
            groups[repr(request.args[1])].append(position)
        result = [""] * len(requests)
        with self._serving(requests) as served:
            for positions in groups.values():  # HFLM would change their order
                served.expect_prompts(positions)
                some = [requests[p] for p in positions]
                rows = self.routing_config.decode_batch
                with nullcontext() if rows is None else self._passes_of(rows):
                    answers = super().generate_until(some, disable_tqdm)
                for position, answer in zip(positions, answers, strict=True):
                    result[position] = answer
        return result

    @contextmanager
    def _serving(self, requests: list[Instance]) -> Iterator[ServedRequests]:
        self._own_routing()
        # Requests without lm-eval's evaluator continue a log until it has ended.
        if self.log.ended and self.world_size == 1:
            self.begin_evaluation()
        with self.log.serving(requests) as served:
            yield served

    def _own_routing(self) -> None:
        """Make sure that the model is still routed by this object.

        Raises
        ------
        ModelError
            If another integration has patched the model since.
        """
        if self.integration.patched:
            return
        try:
            self.integration.patch_model()
        except ModelError as error:
            raise ModelError(
                "The model is no longer routed by this hf-bh object, since another one has patched "
                "it. Call lm_eval_bh.unpatch(model), or evaluate the other object."
            ) from error

    def barrier(self) -> None:
        """Wait for all processes, and send their counters to the first one.

        lm-eval calls it on every process after every kind of request, even if a cache has answered
        them all.
        """
        super().barrier()
        self.log.collect(self.gather_object(self.log.state(), dst=0))

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = self.log.served.expected_rows(requests, self.max_length, self.logits_cache)
        result: list[tuple[float, bool]]
        with self.log.recorder.expecting(rows):
            decode_batch = self.routing_config.decode_batch
            if decode_batch is None:
                result = super()._loglikelihood_tokens(requests, disable_tqdm, **kwargs)
                return result
            # One pass per group, whatever --batch_size: a token's experts, and those that its step
            # reads, depend on the rows decoded with it.
            result = [(0.0, False)] * len(requests)
            groups = decode_batches(
                self.log.served.row_names(requests, self.logits_cache),
                decode_batch,
                self.routing_config.batch_seed,
            )
            quiet = disable_tqdm or self.rank != 0
            for group in tqdm(groups, "Decode batches", disable=quiet):
                some = [requests[position] for position in group]
                with self._passes_of(len(some)):
                    answers = super()._loglikelihood_tokens(some, disable_tqdm=True)
                for position, answer in zip(group, answers, strict=True):
                    result[position] = answer
        return result

    @contextmanager
    def _passes_of(self, rows: int) -> Iterator[None]:
        """Let HFLM make passes with this many rows."""
        before = vars(self)["batch_size_per_gpu"]
        self.batch_size_per_gpu = rows
        try:
            yield
        finally:
            self.batch_size_per_gpu = before

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        if self.routing_config.method.recorded:
            raise ParameterError(
                "batch_size=auto probes with tokens that no log has: give a number with "
                "rule=replay."
            )
        with self.log.recorder.expecting(ExpectedRows()):  # probes have no owner
            return int(super()._detect_batch_size(*args, **kwargs))

    def _warm_up(self, inps: Tensor) -> None:
        """Run a row through the model before the first measured pass.

        The first pass on a device and in a dtype also loads libraries, kernels and memory, and
        takes up to 14 times as long: whichever experiment came first would look slow.
        """
        key = inps.device, self.model.dtype
        if key not in self._warm and not self.routing_config.method.recorded:
            self._warm.add(key)
            with self.log.unlogged():
                super()._model_call(inps[:1])

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs):
            self._warm_up(inps)
        with self.log.recorder.forward(inps) as (real, decoded):
            if self.peft:  # prompt tuning adds virtual tokens
                real = None
            with nullcontext() if real is None else self.integration.real_tokens(real, decoded):
                logits: Tensor = super()._model_call(inps, *args, **kwargs)
            self.log.recorder.scored(logits)
        return logits

    def tok_batch_encode(
        self, strings: list[str], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Tokenise a batch of prompts, see HFLM; remembers them for the next generation."""
        self.log.served.note_batch(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)  # type: ignore[no-any-return]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> Tensor:
        owners, mask = self.log.served.take_batch(), kwargs.get("attention_mask")
        if mask is None:  # not lm-eval's call, so no request's
            owners, mask = [], context
        self._warm_up(context)
        eos = kwargs.get("eos_token_id", self.model.generation_config.eos_token_id)
        with (
            self.log.recorder.generation(owners, context, mask) as generation,
            ending_with([eos, self.tokenizer.pad_token_id]),
        ):
            output: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
            if generation is not None:
                rows, length = context.shape
                criteria = stop_sequences_criteria(self.tokenizer, stop, length, rows)
                generation.finish(output, criteria, eos)
        return output

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's request cache, unless another routing filled it."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            null = self.integration.null_model
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
            guard(cache_hook.dbdict, routing, self._count_cached_request)

    def _count_cached_request(self) -> None:
        self.log.cached_requests += 1

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's model information and, under ``bh``, the routing and its summary.

        lm-eval calls this once, on the first process, after the evaluation, and writes the result
        into ``results["config"]``; so this also finishes the logs.
        """
        self.log.finish()
        info: dict[str, Any] = super().get_model_info()
        return info | {"bh": run_info(self.integration, self.log)}
