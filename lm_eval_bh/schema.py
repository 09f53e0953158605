"""The files that experiments write: their names, fields and versions.

Every module that writes or reads such a file uses this one, which needs neither torch nor lm-eval.

Files
-----
``results_*.json``
    Written by lm-eval. ``config.bh`` is a :class:`RunInfo`: routing configuration, run id and
    routing summary.
``<log_dir>/<run id>/<experiment>_internal_routing.json``
    One per task, with ``log_routing=samples`` or ``full``: an :class:`InternalRouting`.
``<log_dir>/<run id>/tokens/part-*.parquet``
    With ``log_routing=full``: one row per token, layer and owning request, see
    :func:`token_schema`.
``<log_dir>/<run id>/routing.json``
    The :class:`Manifest`, written last: without it the run did not finish.
``logs/<experiment>.json``
    Written by sweeps: an :class:`ExperimentSummary`.
``bh_speed*.json``
    Written by the speed phase: a :class:`SpeedFile`, the only source of speeds that are compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from lm_eval_bh.errors import DataError
from lm_eval_bh.experiment_names import configuration_name as configuration_name
from lm_eval_bh.experiment_names import dataset_name as dataset_name
from lm_eval_bh.experiment_names import experiment_name as experiment_name
from lm_eval_bh.experiment_names import is_file_name
from lm_eval_bh.experiment_names import shortened as shortened
from lm_eval_bh.validation import mismatch

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
MANIFEST = "routing.json"
TOKENS = "tokens"
INTERNAL_ROUTING = "_internal_routing.json"
SPEED = "bh_speed"  # begins the names of the speed phase's files
UNUSED = -1  # pads selected_experts in JSON; in the model the sentinel is the number of experts


class LayerSummary(TypedDict):
    """Exact counters of one layer."""

    layer: int
    mean_experts: float | None
    std_experts: float | None  # population standard deviation over tokens
    histogram: list[int]  # how many tokens got 0, 1, ..., num_experts experts
    usage: list[int]  # how many tokens each expert served
    cross: int  # sum over tokens of this count times the previous routed layer's; first: 0


class StepSummary(TypedDict, total=False):
    """The steps of decode batches, if ``decode_batch`` was given."""

    # Rows decoded together; the last group of a task may have fewer. None where an engine decided,
    # step by step, and its trace was imported.
    decode_batch: int | None
    distinct_experts: float | None  # mean number of distinct experts per routed layer and step
    layer_distinct_experts: list[float | None]  # the same for each routed layer
    steps_by_rows: dict[str, int]  # actual rows of a step -> number of steps


class TaskSummary(StepSummary):
    """The selections for the requests of one task, or of all."""

    tokens: int  # assigned to requests: a row shared by two counts twice; padding never counts
    seconds: float  # forward passes only, the device synchronised, divided among tasks by tokens
    mean_experts_per_token: float | None
    std_experts_per_token: float | None
    layers: list[LayerSummary]


class _RunCounters(TypedDict, total=False):  # not needed by tables
    computed_tokens: int  # computed tokens, each counted once; padding excluded
    padding_tokens: int
    expert_rows_computed: int | None  # one expert applied to one token, probes included; None if
    # transformers' own code, which does not count, computed the experts


class RoutingSummary(TaskSummary, _RunCounters):
    """The summary of a run, over all tasks and per task."""

    cached_requests: int  # answered from --use_cache, so not counted here
    tasks: dict[str, TaskSummary]


class _RuleForPeople(TypedDict, total=False):
    source: str
    random: bool
    alpha: str  # meaning of alpha


class RuleInfo(_RuleForPeople):
    """``results["config"]["bh"]["rule"]``: the description of a selection rule."""

    name: str
    label: str  # for tables and figures; the k of "top-k" is replaced by the number of experts
    fixed_count: bool  # every token gets max_k experts
    tests: bool  # a multiple-testing procedure


class RoutingInfo(TypedDict):
    """The required part of ``config`` of a :class:`RunInfo` that tables use."""

    rule: str
    alpha: float | None
    min_k: int
    max_k: int
    mode: str


class _NotAlwaysWritten(TypedDict, total=False):
    rule: RuleInfo  # missing in the first release
    documents: dict[str, str]  # task -> digest of its documents, independent of their order


class RunInfo(_NotAlwaysWritten):
    """``results["config"]["bh"]``."""

    schema_version: int
    run_id: str
    config: dict[str, Any]  # the routing parameters, by name
    experts: str  # the experts= argument
    log_routing: str
    log_dir: str | None
    routed_layers: list[int]
    num_layers: int
    num_experts: int
    native_top_k: int
    # Values for counting FLOPs.
    model_config: dict[str, float | bool | str | list[Any] | dict[str, Any] | None]
    null_model: dict[str, Any] | None
    summary: RoutingSummary | None  # None with log_routing=off


class ImportedRunInfo(RunInfo):
    """``results["config"]["bh"]`` of another engine's trace."""

    notes: list[str]  # what was skipped, aligned or taken for filler


class ExportedPolicy(TypedDict):
    """``adaptive_routing.policy`` of an exported model's ``config.json``."""

    digest: str  # of everything that decides experts
    model: str  # the exported model, by its hub name or path
    fingerprint: str  # of its routers
    config: dict[str, Any]  # the routing parameters, by name
    rule: RuleInfo
    routed_layers: list[int]
    num_layers: int
    num_experts: int
    native_top_k: int


class LayerStats(TypedDict):
    """``layer_stats`` of one layer of one sample."""

    avg_experts: float
    std_experts: float
    ceiling_hits: int
    floor_hits: int


class _LayerForPeople(TypedDict, total=False):  # not needed by tables
    router_logits_shape: list[int]  # [tokens, experts]
    expert_weights: list[list[float]]  # [tokens][max_k], 0 where unused
    expert_counts: list[int]
    router_logits_sample: list[list[float]]  # of the first tokens
    layer_stats: LayerStats


class SampleLayer(_LayerForPeople):
    """One layer of one sample."""

    layer: int
    selected_experts: list[list[int]]  # [tokens][max_k], padded with -1


class _SampleOfThisRelease(TypedDict, total=False):
    doc_hash: str  # as in lm-eval's samples, which also have the document's id in the task


class Sample(_SampleOfThisRelease):
    """One request of one document."""

    sample_id: int  # the document's place among those evaluated; its id unless --samples was used
    request: int  # number of the request within the document, from 0
    repeat: int  # number of the repetition, from 0
    num_tokens: int
    token_ids: list[int]
    loss: float | None  # nats per scored token; None for generated text
    layers: list[SampleLayer]


class InternalRouting(TypedDict):
    """``<experiment>_internal_routing.json``."""

    schema_version: int
    run_id: str
    config: str  # the experiment's name
    strategy: str  # the rule
    num_experts: int
    dataset: str
    samples: list[Sample]
    aggregate_stats: dict[str, Any]


class Manifest(TypedDict):
    """``routing.json``: the files of a finished run."""

    schema_version: int
    run_id: str
    files: list[str]  # relative to the manifest
    token_rows: int


class _SummaryOfThisRelease(TypedDict, total=False):
    settings: dict[str, Any]  # of the sweep, those that affect the experiment's results
    files: dict[str, str]  # relative to the sweep's folder -> SHA-256
    digest: str  # SHA-256 of everything else


class ExperimentSummary(_SummaryOfThisRelease):
    """``logs/<experiment>.json``, written by sweeps."""

    schema_version: int
    run_id: str
    config: str
    strategy: str
    k_or_max_k: int
    alpha: float | None
    num_experts: int
    dataset: str
    metrics: dict[str, float | str | None]  # the only text is perplexity_of
    summary: dict[str, float | int | None]  # total_samples, total_tokens, elapsed_time_seconds


class SpeedWorkload(TypedDict):
    """The input of a speed phase, equal for every configuration."""

    name: str  # prefill, decode 1, decode 8 or decode 32
    task: str  # task of its text
    batch_size: int
    passes: int  # forward passes of one measurement
    tokens: int  # in all passes, without padding
    dense_flops: int  # without the experts


class SpeedRouting(TypedDict):
    """The routing part of a :class:`RunInfo`."""

    schema_version: int
    rule: RuleInfo
    config: dict[str, Any]
    routed_layers: list[int]
    num_layers: int
    num_experts: int
    native_top_k: int
    null_model: dict[str, Any] | None


class SpeedConfiguration(TypedDict):
    """One of the compared configurations."""

    name: str
    routing: dict[str, Any] | None  # RunInfo without its run; None: the unchanged model


class SpeedWork(TypedDict):
    """The work of one configuration in one workload."""

    expert_rows: int | None  # one expert applied to one token, as selected
    expert_rows_computed: int | None  # None if transformers' own code computes them
    experts_touched: int | None  # number of (pass, layer, expert) whose weights are read
    floor_seconds: float | None  # lower bound on this machine


class SpeedRound(TypedDict):
    """One round: every configuration once."""

    order: list[int]  # indices of configurations
    seconds: list[list[float]]  # [configuration][workload]


class SpeedFile(TypedDict):
    """``bh_speed*.json``: measurements and their conditions, from which everything else follows."""

    schema_version: int
    created: str  # ISO 8601, UTC
    model: str  # as given
    asked: dict[str, Any]  # settings of the phase; equal for a repeated phase
    device: str
    processor: str
    threads: int
    dtype: str
    load_before: list[float]  # load averages over 1, 5 and 15 minutes
    load_after: list[float]
    versions: dict[str, str]
    matmul_flops_per_second: float
    bytes_per_second: float  # by copying or reading, whichever is faster
    native: int  # index of the unchanged model
    workloads: list[SpeedWorkload]
    configurations: list[SpeedConfiguration]
    work: list[list[SpeedWork]]  # [configuration][workload]
    rounds: list[SpeedRound]


def token_schema(with_logits: bool, num_experts: int, with_steps: bool = False) -> pa.Schema:
    """Return the Arrow schema of the token log: one row per token, layer and owning request."""
    import pyarrow as pa

    fields = [
        pa.field("task", pa.dictionary(pa.int32(), pa.string())),
        pa.field("doc_id", pa.int32()),
        pa.field("request", pa.int16()),
        pa.field("repeat", pa.int16()),
        pa.field("layer", pa.int16()),
        pa.field("position", pa.int32()),
        pa.field("token_id", pa.int32()),  # null in an imported trace without ids
        pa.field("count", pa.int16()),
        pa.field("experts", pa.list_(pa.int16())),
        pa.field("weights", pa.list_(pa.float32())),  # null in an imported trace without weights
        # Nats, for this token given the previous ones in its row; null for the first of a row (of a
        # window, if a document is longer than the context), for generations and their prompts, and
        # in imported traces. Earlier logs lack the column.
        pa.field("loss", pa.float32()),
    ]
    if with_steps:  # equal numbers were decoded together; -1 for tokens in no step
        fields.append(pa.field("step", pa.int64()))
    if with_logits:
        fields.append(pa.field("logits", pa.list_(pa.float16(), num_experts)))
    return pa.schema(fields, metadata={"lm_eval_bh_schema": str(SCHEMA_VERSION)})


def read_run_info(results: dict[str, Any], name: str) -> RunInfo | None:
    """Return ``config.bh`` of an lm-eval results file, or None if hf-bh did not write it.

    Raises
    ------
    DataError
        If its schema is newer than this release, or a field is missing or has another type.
    """
    info = results["config"].get("bh")
    if info is None:
        return None
    checked = cast(RunInfo, _of_kind(info, RunInfo, name, "config.bh"))
    _expect(mismatch(checked["config"], RoutingInfo, "config.bh.config"), name)
    if not is_file_name(checked["run_id"]):
        raise DataError(f"{name} is damaged: its run id is not a file name; evaluate again.")
    return checked


def read_internal_routing(path: Path) -> InternalRouting:
    """Read ``<experiment>_internal_routing.json``.

    Raises
    ------
    DataError
        If it is missing or damaged, or its schema is newer than this release.
    """
    return cast(InternalRouting, _of_kind(read_json(path), InternalRouting, str(path), "the log"))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a run's log folder and check that its files exist.

    Raises
    ------
    DataError
        If there is none, because the run still goes on or was killed, if it is damaged or belongs
        to another run, or if a file is missing.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder} has no {MANIFEST}: the run that wrote it did not finish; run it again."
        )
    content = cast(Manifest, _of_kind(read_json(path), Manifest, str(path), "the manifest"))
    for name in content["files"]:
        if not all(map(is_file_name, name.split("/"))):
            raise DataError(
                f"{path} is damaged: it names a file outside; run the evaluation again."
            )
        if not (folder / name).is_file():
            raise DataError(f"{folder} is incomplete: it lacks {name}; run the evaluation again.")
    return content


def read_summary(path: Path) -> ExperimentSummary:
    """Read ``logs/<experiment>.json``.

    Raises
    ------
    DataError
        If it is missing or damaged, or its schema is newer than this release.
    """
    return cast(
        ExperimentSummary, _of_kind(read_json(path), ExperimentSummary, str(path), "the summary")
    )


def read_speed(path: Path) -> SpeedFile:
    """Read the file of a speed phase.

    Raises
    ------
    DataError
        If it is missing or damaged, or its schema is newer than this release.
    """
    found = cast(SpeedFile, _of_kind(read_json(path), SpeedFile, str(path), "the file"))
    configurations, workloads = len(found["configurations"]), len(found["workloads"])
    tables: list[list[Any]] = [found["work"], *(list(one["seconds"]) for one in found["rounds"])]
    shapes = {(len(table), *map(len, table)) for table in tables}
    if not found["rounds"] or shapes != {(configurations, *[workloads] * configurations)}:
        _expect("its tables do not match its configurations and workloads", str(path))
    seconds = [s for one in found["rounds"] for row in one["seconds"] for s in row]
    if not all(0 < s < float("inf") for s in seconds):
        _expect("a time must be a positive number of seconds", str(path))
    if not 0 <= found["native"] < configurations:
        _expect("it lacks the unchanged model", str(path))
    for one in found["configurations"]:
        if one["routing"] is not None:
            check_version(one["routing"], str(path))
            _expect(mismatch(one["routing"], SpeedRouting, "a routing"), str(path))
            _expect(mismatch(one["routing"]["config"], RoutingInfo, "a routing.config"), str(path))
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    DataError
        If the file cannot be read or is not a JSON object.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path} could not be read: it is not a file; remove it.")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair could not be written again
            json.dumps(content, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} could not be read: {error}; fix or remove the file.") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} is not an lm-eval-bh log: found a {type(content).__name__}, not an object; "
            "fix or remove the file."
        )
    return content


def check_version(content: dict[str, Any], name: str) -> None:
    """Raise :class:`DataError` if this release cannot read the schema of the content."""
    version = content.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise DataError(
            f"{name} is not an lm-eval-bh log: it has no schema version; use another file."
        )
    if version > SCHEMA_VERSION:
        raise DataError(
            f"{name} is too new: schema version {version}, and this release reads up to "
            f"{SCHEMA_VERSION}; upgrade lm-eval-bh."
        )


def _of_kind(content: Any, kind: Any, name: str, place: str) -> Any:
    if isinstance(content, dict):
        check_version(content, name)
    _expect(mismatch(content, kind, place), name)
    return content


def _expect(reason: str | None, name: str) -> None:
    if reason is not None:
        raise DataError(f"{name} is damaged: {reason}; run the evaluation again.")
