"""``hf-bh``: the lm-eval model that routes by a statistical test."""

from __future__ import annotations

import dataclasses
import inspect
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor

from lm_eval_bh.errors import ModelError, ParameterError, did_you_mean, show_as_one_sentence
from lm_eval_bh.harness.recorder import Recorder, TokenIds
from lm_eval_bh.harness.summary import summarize
from lm_eval_bh.resources import TINY_OLMOE, tiny_olmoe
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.integration import BHRoutingIntegration
from lm_eval_bh.routing.rules import RULES

DEFAULT_MODEL = "allenai/OLMoE-1B-7B-0924"

# What HFLM hands on to from_pretrained; any other name it does not know is a misspelling.
FROM_PRETRAINED = frozenset(
    {
        "attn_implementation",
        "bnb_4bit_compute_dtype",
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


class BHLM(HFLM):
    """A Hugging Face mixture-of-experts model whose routers ask a multiple-testing question.

    Everything that ``--model hf`` takes is taken too; see HFLM.

    Parameters
    ----------
    pretrained : str
        A hub name, a folder, or ``tiny-olmoe``, the model that ships.
    alpha, max_k, min_k, temperature, rule, mode, renormalize, layers
        See :class:`~lm_eval_bh.routing.config.RoutingConfig`. ``alpha`` is 0.4 unless given.
    kde : str
        ``auto``, or the path of a null model.
    experts : str
        What computes the experts, see
        :class:`~lm_eval_bh.routing.integration.BHRoutingIntegration`.

    Raises
    ------
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
        experts: str = "auto",
        **kwargs: Any,
    ) -> None:
        _check_names(kwargs)
        _check_contradictions(rule, alpha=alpha, min_k=min_k, max_k=max_k, kde=kde)
        self.routing_config = RoutingConfig(
            alpha=0.4 if alpha is None else alpha,
            rule=rule,
            min_k=1 if min_k is None else min_k,
            max_k=max_k,
            temperature=temperature,
            renormalize=renormalize,  # type: ignore[arg-type]
            mode=mode,
            layers=str(layers),
        )
        if kde not in (None, "auto") and not Path(str(kde)).exists():
            raise ParameterError(
                f"kde={str(kde)!r} is no file or folder: "
                "give the path of a null model, or kde=auto."
            )
        self.run_id = uuid.uuid4().hex
        name = (
            pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", "")
        )
        try:
            super().__init__(
                pretrained=str(tiny_olmoe()) if pretrained == TINY_OLMOE else pretrained, **kwargs
            )
        except OSError as error:
            raise ModelError(
                f"The model {name!r} could not be loaded ({str(error).splitlines()[0]}): "
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
            kde=kde or "auto",
            experts=experts,
            tokenizer=self.tokenizer,
            **self.routing_config.as_dict(),
        )
        self.recorder = Recorder(
            self.integration.layers, len(self.integration.routers), self.integration.num_experts
        )
        self.integration.observers.append(self.recorder.observe)
        self.integration.patch_model()
        self._states: list[dict[str, Any]] = []
        self._rolling: list[int] | None = None
        self._prompts: dict[str, list[int]] = {}
        self._batch_prompts: list[str] = []

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
        arg_dict.setdefault(
            "pretrained", DEFAULT_MODEL
        )  # lm-eval names the results folder after it
        return super().create_from_arg_obj(arg_dict, additional_config)  # type: ignore[no-any-return]

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        config = self.config.get_text_config()
        num_experts = getattr(config, "num_experts", None) or getattr(
            config, "num_local_experts", None
        )
        if isinstance(num_experts, int):
            self.routing_config.check_experts(num_experts)  # said before any weights are read
        super()._create_model(*args, **kwargs)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations, see HFLM."""
        with self.recorder.serving(requests):
            result = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._share_counters()
        return result  # type: ignore[no-any-return]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole documents in windows, see HFLM."""
        with self.recorder.serving(requests):
            self._rolling = [
                position
                for position, request in enumerate(requests)
                for _ in self._windows(request)
            ]
            result = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            self._rolling = None
        self._share_counters()
        return result  # type: ignore[no-any-return]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate text, see HFLM."""
        with self.recorder.serving(requests):
            self._prompts = defaultdict(list)
            for position, request in enumerate(requests):
                self._prompts[request.args[0]].append(position)
            result = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._share_counters()
        return result  # type: ignore[no-any-return]

    def _windows(self, request: Instance) -> Iterator[Any]:
        """Cut a document into the windows that HFLM scores it in."""
        windows: Iterator[Any] = utils.get_rolling_token_windows(
            token_list=self.tok_encode(request.args[0]),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return windows

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        positions: Sequence[int] = range(len(requests))
        if self._rolling is not None:
            # Windows come in order, batch by batch; copies even out processes.
            positions = self._rolling[: len(requests)]
            self._rolling = self._rolling[len(requests) :]
        owners: dict[TokenIds, list[str]] = defaultdict(list)
        for position, (_, context, continuation) in zip(positions, requests, strict=False):
            task = self.recorder.task_of(position)
            if task is not None:
                owners[tuple((context + continuation)[-(self.max_length + 1) :][:-1])].append(task)
        with self.recorder.expecting(owners):
            return super()._loglikelihood_tokens(requests, *args, **kwargs)  # type: ignore[no-any-return]

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        with self.recorder.ignoring():
            return super()._detect_batch_size(*args, **kwargs)  # type: ignore[no-any-return]

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self.recorder.forward(inps):
            return super()._model_call(inps, *args, **kwargs)  # type: ignore[no-any-return]

    def tok_batch_encode(
        self, strings: list[str], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Tokenise a batch of prompts, see HFLM; remembers them for the generation that follows."""
        self._batch_prompts = list(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)  # type: ignore[no-any-return]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> Tensor:
        rows: list[list[str]] = []
        for prompt in self._batch_prompts:
            waiting = self._prompts[prompt]
            task = self.recorder.task_of(waiting.pop(0)) if waiting else None
            rows.append([] if task is None else [task])
        with self.recorder.generation(rows, kwargs["attention_mask"]) as generation:
            output: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
            generation.fed = self._tokens_fed(output, context.shape[1], stop)
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

    def _share_counters(self) -> None:
        """Collect the counters of all processes on the first one."""
        state = self.recorder.state()
        states = self.gather_object(state, dst=0) if self.world_size > 1 else [state]
        if states is not None:
            self._states = states

    def get_model_info(self) -> dict[str, Any]:
        """Return what HFLM tells about the model and, under ``bh``, the routing and its summary.

        lm-eval calls this once, on the first process, after the evaluation, and writes it into
        ``results["config"]``.
        """
        routers = self.integration.routers
        info: dict[str, Any] = super().get_model_info()
        return info | {
            "bh": {
                "run_id": self.run_id,
                "config": self.routing_config.as_dict(),
                "routed_layers": self.integration.layers,
                "num_layers": len(routers),
                "num_experts": self.integration.num_experts,
                "native_top_k": routers[0].top_k,
                "null_model": None
                if self.integration.null is None
                else dataclasses.asdict(self.integration.null.header),
                "summary": summarize(self._states, self.integration.layers),
            }
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


def _check_contradictions(rule: str, *, alpha: Any, min_k: Any, max_k: Any, kde: Any) -> None:
    if rule not in RULES or RULES[rule].adaptive:
        return
    for name, value in (("alpha", alpha), ("kde", kde)):
        if value is not None:
            raise ParameterError(
                f"{name}={value!r} has no meaning with rule={rule}, which tests nothing: "
                "leave it out."
            )
    if min_k not in (None, max_k):
        raise ParameterError(
            f"min_k={min_k} contradicts rule={rule}, which always takes max_k={max_k}: "
            "leave it out."
        )
