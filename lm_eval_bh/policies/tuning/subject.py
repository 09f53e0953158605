"""The model of a search, and everything that its measurements share."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lm_eval_bh.errors import BHError, NullModelError
from lm_eval_bh.policies.decision_time import decision_seconds, table_bytes
from lm_eval_bh.policies.document_losses import Documents, Floats
from lm_eval_bh.policies.fidelity import OwnOutputs
from lm_eval_bh.policies.layer_budgets import layer_sensitivities
from lm_eval_bh.policies.tuning.candidates import Family
from lm_eval_bh.policies.tuning.journal import FILE, Journal, Row
from lm_eval_bh.policies.tuning.splits import Splits
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.heard import TOKENS
from lm_eval_bh.routing.patching.integration import BHRoutingIntegration
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.calibration import calibrate_and_check
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint
from lm_eval_bh.routing.tables.null_kind import NullKind
from lm_eval_bh.routing.tables.null_match import check_routers
from lm_eval_bh.routing.tables.null_model import NullModel
from lm_eval_bh.threads import CoresWatch

SCREEN, VALIDATION, CONFIRMATION = "screen", "validation", "confirmation"
SENSITIVITY_TOKENS = 16384
SCREEN_TOKENS = 4096  # for solving in a first look, and twice as many for measuring
MEASURING = 3  # increase if the same model and texts would give other rows
# Errors of methods or models that do not fit: reasons in a row, which end nothing.
FAILURES = (BHError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError)


class Subject:
    """Measures policies of one model, each once, unless the journal has them already.

    Parameters
    ----------
    model : PreTrainedModel
        The model, not patched.
    tokenizer : PreTrainedTokenizerBase
        Tokenizer of the model.
    name : str
        Name of the model for the files.
    splits : Splits
        The texts.
    folder : Path
        Folder of the journal and the null models.
    settings : mapping
        Settings that bind the journal, besides model and text.
    tokens, length, batch, tokens_per_document : int
        Calibration tokens; window length in tokens; windows per batch; scored tokens per
        document of validation text.
    most_tokens : int, optional
        Scored tokens of the unseen text; default all.
    decode_batch : int, optional
        Number of windows decoded together, to count distinct experts.
    by_group : bool
        Whether to resample these groups instead of documents: with policies of a step, a token's
        loss depends on the tokens decoded with it.
    file : str
        Name of the journal.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        name: str,
        splits: Splits,
        folder: Path,
        settings: dict[str, Any],
        *,
        tokens: int = 65536,
        length: int = 512,
        batch: int = 16,
        tokens_per_document: int = 1024,
        most_tokens: int | None = None,
        decode_batch: int | None = None,
        by_group: bool = False,
        file: str = FILE,
    ) -> None:
        self.model, self.tokenizer, self.name, self.splits = model, tokenizer, name, splits
        self.folder, self.tokens, self.length, self.batch = folder, tokens, length, batch
        self.routers = find_routers(model)
        self.native = self.routers[0].top_k
        self.layers = len(self.routers)
        self.fingerprint = router_fingerprint(router.weight for router in self.routers)
        cut: dict[str, Any] = {"length": length, "batch": batch}
        few: dict[str, Any] = cut | {"tokens_per_document": tokens_per_document}
        self.documents = {
            SCREEN: Documents.of(
                tokenizer, splits.validation, most_tokens=2 * SCREEN_TOKENS, **few
            ),
            VALIDATION: Documents.of(tokenizer, splits.validation, **few),
            CONFIRMATION: Documents.of(
                tokenizer, splits.confirmation, most_tokens=most_tokens, **cut
            ),
        }
        self.decode_batch = decode_batch
        self._put_together(decode_batch, by_group)
        self._own = OwnOutputs(model, self.documents[CONFIRMATION])
        self._cores = CoresWatch()
        weight = next(model.parameters())
        self.journal = Journal(
            folder,
            settings
            | {
                "model": name,
                "fingerprint": self.fingerprint,
                "weights": weights_digest(model),
                "dtype": str(weight.dtype).removeprefix("torch."),
                "device": weight.device.type,
                "text": splits.name,
                "digest of the text": splits.digest,
                "calibration_tokens": tokens,
                "length": length,
                "tokens_per_document": tokens_per_document,
                "most_tokens": most_tokens,
                "decode_batch": decode_batch,
                "by_group": by_group,
                "version of the measuring code": MEASURING,
                "digest of its tokens": self._digest_of_tokens(),
            },
            documents={text: len(found.tokens) for text, found in self.documents.items()},
            shape=(self.layers, self.native),
            file=file,
        )
        self._nulls: dict[NullKind, NullModel] = {}
        self._failed: dict[NullKind, BHError] = {}

    def _put_together(self, rows: int | None, by_group: bool) -> None:
        found = self.documents
        if rows is not None and by_group:
            for text in (VALIDATION, CONFIRMATION):
                found[text] = found[text].grouped(rows)
            found[SCREEN] = found[VALIDATION].first(2 * SCREEN_TOKENS)
        elif rows is not None:
            found[CONFIRMATION] = found[CONFIRMATION].side_by_side(rows)

    def _digest_of_tokens(self) -> str:
        """Return a digest that depends on how the tokenizer cuts the texts."""
        found = hashlib.sha256()
        for documents in self.documents.values():
            windows = sorted(window for batch in documents.batches for window in batch)
            found.update(json.dumps(windows).encode())
        return found.hexdigest()

    def measure(
        self, text: str, family: Family, config: RoutingConfig, faithful: bool = False
    ) -> Row:
        """Solve a family's member if needed, run it over a text, and keep the result.

        If the model does not support it, or a target is unreachable, the row holds the reason. A
        ``faithful`` row, on confirmation text, also has divergences and costs, which takes a second
        pass if the model's own distributions do not fit into memory.
        """
        key = config.as_dict()
        known = self.journal.get(text, key)
        if known and (known.failed or known.divergences or not faithful):
            return known
        row = Row(family.name, key)
        try:
            self._fill(row, text, family, config, faithful)
        except FAILURES as error:
            ours = isinstance(error, BHError)
            row = Row(family.name, key)
            row.failed = str(error) if ours else f"{type(error).__name__}: {error}"
        return self.journal.add(text, key, row)

    def _fill(
        self, row: Row, text: str, family: Family, config: RoutingConfig, faithful: bool
    ) -> None:
        if family.null_kind is not None:
            self._null(family.null_kind)  # so that its time does not count as solving
        start = time.perf_counter()
        routing = self._routing(family, config, text)
        row.seconds = time.perf_counter() - start
        self._cores.start()
        if faithful:
            assert text == CONFIRMATION
            outcome = self._own.outcome(routing)
            row.losses = outcome.losses.tolist()
            row.divergences, row.changed = outcome.divergences.tolist(), outcome.changed.tolist()
            row.decision = decision_seconds(routing, self.documents[text])
            row.table_bytes = table_bytes(routing)
        else:
            with routing:
                row.losses = self.documents[text].losses(self.model).tolist()
        self._cores.check()
        assert routing.counters is not None
        row.mean_experts = routing.counters.mean()
        row.distinct_experts = routing.counters.mean_distinct()
        row.solved = None if routing.solution is None else routing.solution.as_dict()

    def calibration_seconds(self, family: Family) -> float:
        """Return the calibration time of a family's tables, which others may share."""
        kind = family.null_kind
        return 0.0 if kind is None else self.journal.seconds.get(self._path(kind).name, 0.0)

    def policy(self, family: Family, config: RoutingConfig, **provenance: Any) -> Policy:
        """Return the measured policy."""
        return self._routing(family, config).policy(**provenance)

    def sensitivities(self) -> Floats:
        """Return the loss's sensitivity to each layer, measured on calibration text."""
        if self.journal.sensitivities is None:
            texts = self.splits.calibration[:64]
            size = min(self.tokens, SENSITIVITY_TOKENS)
            documents = Documents.of(
                self.tokenizer,
                texts,
                length=self.length,
                batch=self.batch,
                tokens_per_document=max(1, size // len(texts)),
            )

            def loss() -> float:
                return float(documents.losses(self.model).sum() / documents.tokens.sum())

            found = layer_sensitivities(self.model, self.layers, self.native, loss)
            self.journal.sensitivities = found.tolist()
            self.journal.write()
        return np.array(self.journal.sensitivities)

    def _routing(
        self, family: Family, config: RoutingConfig, text: str = CONFIRMATION
    ) -> BHRoutingIntegration:
        null = None if family.null_kind is None else self._null(family.null_kind)
        solved = [
            row.solution
            for text in (VALIDATION, CONFIRMATION)
            if (row := self.journal.get(text, config.as_dict())) and row.solution is not None
        ]
        if solved and not config.affine:  # rows do not keep the affine fit
            policy = Policy(
                config,
                self.fingerprint,
                self.layers,
                self.routers[0].num_experts,
                self.native,
                solved[0],
                null,
            )
            return BHRoutingIntegration(self.model, policy=policy)
        return BHRoutingIntegration(
            self.model,
            config,
            null_model=null or "auto",
            tokenizer=self.tokenizer,
            texts=self._texts(min(SCREEN_TOKENS, self.tokens) if text == SCREEN else self.tokens),
        )

    def _texts(self, tokens: int) -> list[str]:
        """Return the calibration documents up to about this many tokens, or all."""
        if tokens >= TOKENS:
            return list(self.splits.calibration)
        found: list[str] = []
        for document in self.splits.calibration:
            size = len(self.tokenizer(document, add_special_tokens=False)["input_ids"])
            found.append(document if size <= tokens else document[: len(document) * tokens // size])
            tokens -= size
            if tokens <= 0:
                break
        return found

    def _null(self, kind: NullKind) -> NullModel:
        """Return the null model of a kind, calibrated once and kept in the folder."""
        if kind in self._failed:
            raise self._failed[kind]
        if kind not in self._nulls:
            try:
                self._nulls[kind] = self._kept(kind) or self._calibrated(kind)
            except BHError as error:
                self._failed[kind] = error
                raise
        return self._nulls[kind]

    def _path(self, kind: NullKind) -> Path:
        return self.folder / f"null{kind.suffix}.safetensors"

    def _kept(self, kind: NullKind) -> NullModel | None:
        path = self._path(kind)
        if not path.exists():
            return None
        try:
            found = NullModel.load(path)
            check_routers(
                found.header,
                self.fingerprint,
                self.layers,
                self.routers[0].num_experts,
                self.name,
            )
        except NullModelError:
            return None  # calibrated again, which replaces it
        # A null model from another search was calibrated on another text.
        return found if found.digest() == self.journal.nulls.get(path.name) else None

    def _calibrated(self, kind: NullKind) -> NullModel:
        start = time.perf_counter()
        made, _ = calibrate_and_check(
            self.model,
            self.tokenizer,
            [router.module for router in self.routers],
            self.splits.calibration,
            tokens=self.tokens,
            length=self.length,
            model_name=self.name,
            revision=None,
            text_name=self.splits.name,
            kind=kind,
            experts=self.routers[0].num_experts,
        )
        path = self._path(kind)
        made.save(path)
        self.journal.nulls[path.name] = made.digest()
        self.journal.seconds[path.name] = time.perf_counter() - start
        self.journal.write()
        return made


def weights_digest(model: nn.Module) -> str:
    """Return a digest of the weights: of each its name, shape, sum and norms.

    Rounded, since threads and devices add up in different orders.
    """
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        numbers: list[str] = []
        if weight.is_floating_point():
            flat = weight.detach().flatten()
            size, norm = (torch.linalg.vector_norm(flat, n, dtype=torch.float64) for n in (1, 2))
            share = flat.sum(dtype=torch.float64) / size.clamp(min=1e-300)
            numbers = [f"{float(size):.6g}", f"{float(norm):.6g}", f"{float(share):.6f}"]
        found.update(repr((name, tuple(weight.shape), numbers)).encode())
    return found.hexdigest()
