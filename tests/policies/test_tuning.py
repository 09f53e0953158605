"""A search: its candidates, choice, confirmation and files; resuming; and errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil

import pytest
import torch

from lm_eval_bh import BHRoutingIntegration, ParameterError, Policy, UnreachableError
from lm_eval_bh.errors import DataError, ModelError
from lm_eval_bh.policies.document_losses import Documents
from lm_eval_bh.policies.tuning import subject as subject_module
from lm_eval_bh.policies.tuning.candidates import Family, named, winner
from lm_eval_bh.policies.tuning.journal import FILE, Journal
from lm_eval_bh.policies.tuning.run import POLICY, tune
from lm_eval_bh.policies.tuning.search import PER_LAYER, Search
from lm_eval_bh.policies.tuning.splits import LEAST_DOCUMENTS, Splits
from lm_eval_bh.policies.tuning.subject import CONFIRMATION, SCREEN, VALIDATION, Subject
from lm_eval_bh.routing.methods.gains import PARAMETERS as GAINS

FAMILIES = [Family("min_w weight", {"rule": "min_w"}), Family("top_p", {"rule": "top_p"})]
NAN = math.nan
SIZES = {"tokens": 4096, "length": 128, "tokens_per_document": 60}
SMALL = {"tokens": 1024, "length": 64, "tokens_per_document": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return one folder for many tests, which share measurements."""
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def subject(tiny, tokenizer, splits, folder):
    return Subject(tiny, tokenizer, "tiny-olmoe", splits, folder, {"target": 4.0}, **SIZES)


def test_a_search_chooses_on_validation_text_and_confirms_on_other(subject, folder, monkeypatch):
    monkeypatch.setattr("lm_eval_bh.policies.tuning.search.adaptive_families", lambda: FAMILIES)
    policy, account = tune(subject, target_experts=4.0, progress=False)
    tried = {row["name"]: row for row in account["tried"]}
    assert set(tried) == {
        "topk", "topk mass 0", "topk mass 0.2", "topk mass 0.5", "topk per layer", "min_w weight",
        "top_p",
    }  # fmt: skip
    assert not any(row["failed"] for row in tried.values())
    assert tried["topk"]["difference"]["difference"] == pytest.approx(0, abs=1e-9)
    best = min(tried.values(), key=lambda row: row["difference"]["relative"])
    assert account["winner"] == best
    assert sorted(account["static"]) == list(range(1, 9))
    found = account["confirmation"]
    assert abs(found["mean_experts"] / 4 - 1) < 0.1
    assert best["name"] not in found["controls"]
    assert set(found["controls"]) <= set(tried) - {"min_w weight", "top_p"}

    saved = Policy.load(folder / POLICY)
    assert saved.digest() == policy.digest()
    assert saved.provenance["measured"] == found
    # Run by hand, the policy loses on the unseen documents what the account says.
    documents = subject.documents[CONFIRMATION]
    with BHRoutingIntegration(subject.model, policy=saved) as routing:
        losses = documents.losses(subject.model)
    perplexity = torch.tensor(losses.sum() / documents.tokens.sum()).exp().item()
    # The search takes one thread, and another number of threads adds in another order.
    assert found["native"]["perplexity"] == pytest.approx(perplexity, rel=1e-7)
    assert found["mean_experts"] == routing.counters.mean()
    json.dumps(account, allow_nan=False)


def test_no_document_is_in_two_texts(splits):
    parts = [set(splits.calibration), set(splits.validation), set(splits.confirmation)]
    assert sum(map(len, parts)) == len(set.union(*parts))


# Each way to decide, and each statistic.
MEETING = [
    "min_w", "min_w predicted mass 0.2", "bh benefit", "p_value contribution", "top_p", "min_p"
]  # fmt: skip


@pytest.mark.parametrize("name", MEETING)
def test_every_family_meets_the_mean(subject, name):
    family = named(name)
    row = subject.measure(VALIDATION, family, family.at(4.0, subject.native))
    assert row.failed is None
    assert row.mean_experts == pytest.approx(4.0, rel=0.1)
    assert row.solution.mean_experts == pytest.approx(4.0, rel=0.02)


def test_an_interrupted_search_goes_on(tiny, tokenizer, splits, tmp_path, monkeypatch):
    def start():
        fresh = Subject(tiny, tokenizer, "tiny-olmoe", splits, tmp_path, {}, **SMALL)
        return Search(fresh, FAMILIES, progress=False)

    measured = []
    losses = Documents.losses

    def stop_after_four(self, model):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(losses(self, model))
        return measured[-1]

    monkeypatch.setattr(subject_module.Documents, "losses", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        start().for_mean(4.0)
    kept = json.loads((tmp_path / FILE).read_text())["rows"]
    assert len(kept) == 4
    monkeypatch.undo()
    start().for_mean(4.0)

    def never(self, model):
        raise AssertionError("measured again")

    monkeypatch.setattr(subject_module.Documents, "losses", never)
    again = start().for_mean(4.0)
    assert again.difference is not None
    rows = json.loads((tmp_path / FILE).read_text())["rows"]
    assert {key: rows[key] for key in kept} == kept


def test_a_folder_of_another_search_is_refused(tiny, tokenizer, splits, tmp_path):
    first = Subject(tiny, tokenizer, "tiny-olmoe", splits, tmp_path, {"target": 4.0}, **SIZES)
    first.journal.write()
    with pytest.raises(ParameterError, match=r"other settings \(target 4.0, not 5.0\)"):
        Subject(tiny, tokenizer, "tiny-olmoe", splits, tmp_path, {"target": 5.0}, **SIZES)


WHOLE = {
    "format_version": 4, "settings": {}, "rows": {}, "sensitivities": None, "nulls": {},
    "seconds": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", '"x"', "3", '{"format_version": 4}', "[" * 100_000,
        json.dumps(WHOLE | {"format_version": 9}),
        json.dumps(WHOLE | {"format_version": 3}),
        json.dumps(WHOLE | {"format_version": "2", "rows": 3}),
        json.dumps(WHOLE | {"settings": []}),
        json.dumps(WHOLE | {"nulls": {"a": 1}}),
        json.dumps(WHOLE | {"rows": {"a": 1}}),
        json.dumps(WHOLE | {"rows": []}),
        json.dumps(WHOLE | {"sensitivities": 3}),
        json.dumps(WHOLE | {"sensitivities": [["a"]]}),
    ],
    ids=lambda content: content[:40],
)  # fmt: skip
def test_a_damaged_journal_is_named(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DataError, match=FILE):
        Journal(tmp_path, {}, documents={}, shape=(4, 8))


@pytest.fixture(scope="module")
def searched(tmp_path_factory, tiny, tokenizer, splits):
    """Return a finished small search, whose folder has its journal."""
    folder = tmp_path_factory.mktemp("searched")
    subject = Subject(tiny, tokenizer, "tiny-olmoe", splits, folder, {}, **SMALL)
    subject.measure(VALIDATION, FAMILIES[0], FAMILIES[0].at(4.0, 8))
    subject.sensitivities()
    subject._null(winner().null_kind)
    return subject


def row_of(content):
    return next(iter(content["rows"].values()))


def solved_of(content):
    return row_of(content)["solved"]


CHANGES = {
    "sensitivities of other layers": lambda c: c["sensitivities"].pop(),
    "sensitivities of another top-k": lambda c: c["sensitivities"][0].pop(),
    "a sensitivity that is not finite": lambda c: c["sensitivities"][0].__setitem__(0, NAN),
    "a loss too few": lambda c: row_of(c)["losses"].pop(),
    "a loss too many": lambda c: row_of(c)["losses"].append(1.0),
    "no loss": lambda c: row_of(c).update(losses=[]),
    "a divergence too few": lambda c: row_of(c).update(divergences=[1.0]),
    "a divergence that is not finite": lambda c: row_of(c).update(
        divergences=[NAN] * len(row_of(c)["losses"])
    ),
    "a loss as text": lambda c: row_of(c)["losses"].__setitem__(0, "1"),
    "a loss that is not finite": lambda c: row_of(c)["losses"].__setitem__(0, NAN),
    "no mean": lambda c: row_of(c).update(mean_experts=None),
    "an infinite mean": lambda c: row_of(c).update(mean_experts=math.inf),
    "infinite distinct experts": lambda c: row_of(c).update(distinct_experts=math.inf),
    "a mean as text": lambda c: row_of(c).update(mean_experts="4"),
    "a name that is no text": lambda c: row_of(c).update(name=3),
    "a failure that is no text": lambda c: row_of(c).update(failed=True),
    "an unknown field": lambda c: row_of(c).update(more=1),
    "a missing field": lambda c: row_of(c).pop("solved"),
    "no solution": lambda c: row_of(c).update(solved=None),
    "another configuration": lambda c: row_of(c)["config"].update(target_experts=5.0),
    "an unknown parameter": lambda c: row_of(c)["config"].update(beta=5.0),
    "no configuration": lambda c: row_of(c).update(config={}),
    "a solution of no layer": lambda c: solved_of(c).update(alphas={}),
    "a solution of a far layer": lambda c: solved_of(c)["alphas"].update({"99": 0.1}),
    "a layer that is no number": lambda c: solved_of(c)["alphas"].update({"x": 0.1}),
    "a level that is not finite": lambda c: solved_of(c)["alphas"].update({"0": NAN}),
    "a level as text": lambda c: solved_of(c)["alphas"].update({"0": "1"}),
    "a solution without a mean": lambda c: solved_of(c).pop("mean_experts"),
    "an unknown field of a solution": lambda c: solved_of(c).update(more=1),
    "a row of another text": lambda c: c["rows"].update({"training {}": row_of(c)}),
    "a row of no text": lambda c: c["rows"].update({"": row_of(c)}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_edited_journal_is_one_sentence(change, searched, tmp_path):
    content = json.loads((searched.folder / FILE).read_text())
    change(content)
    (tmp_path / FILE).write_text(json.dumps(content))
    sizes = {text: len(documents.tokens) for text, documents in searched.documents.items()}
    shape = (searched.layers, searched.native)
    with pytest.raises(DataError, match=rf"{FILE} is damaged \(.*\): remove it to start over"):
        Journal(tmp_path, content["settings"], documents=sizes, shape=shape)


def test_an_untouched_journal_is_read_whole(searched, tiny, tokenizer, splits):
    again = Subject(tiny, tokenizer, "tiny-olmoe", splits, searched.folder, {}, **SMALL)
    content = json.loads((searched.folder / FILE).read_text())
    assert {key: dataclasses.asdict(row) for key, row in again.journal.rows.items()} == (
        content["rows"]
    )
    assert again.journal.sensitivities == content["sensitivities"]


def other_weight(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.5
    return model


def start(model, splits, settings, sizes, tokenizer, folder):
    return Subject(model, tokenizer, "tiny-olmoe", splits, folder, settings, **sizes)


@pytest.fixture(scope="module")
def begun(tiny, tokenizer, splits, tmp_path_factory):
    """Return what started a search, whose folder has its journal."""
    arguments = {"model": tiny, "splits": splits, "settings": {"preset": "winner"}, "sizes": SMALL}
    arguments |= {"tokenizer": tokenizer, "folder": tmp_path_factory.mktemp("begun")}
    start(**arguments).journal.write()
    start(**arguments)
    return arguments


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("digest of the text", lambda a: a.update(splits=changed_part(a, "calibration"))),
        ("digest of the text", lambda a: a.update(splits=changed_part(a, "validation"))),
        ("digest of the text", lambda a: a.update(splits=changed_part(a, "confirmation"))),
        ("dtype", lambda a: a.update(model=copy.deepcopy(a["model"]).bfloat16())),
        ("weights", lambda a: a.update(model=other_weight(a["model"]))),
        ("preset", lambda a: a.update(settings={"preset": "search"})),
        ("tokens_per_document", lambda a: a["sizes"].update(tokens_per_document=30)),
        ("length", lambda a: a["sizes"].update(length=32)),
        ("calibration_tokens", lambda a: a["sizes"].update(tokens=2048)),
    ],
)
def test_rows_of_anything_else_are_not_kept(setting, change, begun):
    arguments = begun | {"sizes": dict(SMALL)}
    change(arguments)
    with pytest.raises(ParameterError, match=rf"other settings \({setting}"):
        start(**arguments)


def changed_part(arguments, part):
    """Return a text of the same name and sizes with one different paragraph."""
    documents = list(getattr(arguments["splits"], part))
    documents[0] = documents[0][:-2] + "!!"
    return dataclasses.replace(arguments["splits"], **{part: documents})


def test_a_null_model_that_another_search_left_is_not_taken(
    searched, tiny, tokenizer, splits, tmp_path
):
    kind = winner().null_kind
    file = next(searched.folder.glob("null*.safetensors"))
    again = Subject(tiny, tokenizer, "tiny-olmoe", splits, searched.folder, {}, **SMALL)
    assert again._kept(kind) is not None
    shutil.copy(file, tmp_path / file.name)
    fresh = Subject(tiny, tokenizer, "tiny-olmoe", splits, tmp_path, {}, **SMALL)
    assert fresh._kept(kind) is None


@pytest.mark.parametrize("mean", [0.5, 1.0, 8.0, 9.0])
def test_a_mean_out_of_range_is_refused_with_the_range(subject, mean):
    with pytest.raises(ParameterError, match="between 1 and 8"):
        Search(subject, FAMILIES, progress=False).for_mean(mean)


def test_what_cannot_be_had_is_a_row_with_the_reason(
    tiny, tokenizer, splits, tmp_path, monkeypatch
):
    subject = Subject(tiny, tokenizer, "tiny-olmoe", splits, tmp_path, {}, **SMALL)

    def no_gradients(*arguments, **options):
        raise ModelError("The gradients cannot be computed: use statistic=contribution.")

    monkeypatch.setattr(subject_module, "calibrate_and_check", no_gradients)
    chosen = Search(subject, [winner(), FAMILIES[0]], progress=False).for_mean(4.0)
    assert chosen.family != winner()
    row = subject.measure(VALIDATION, winner(), winner().at(4.0, 8))
    assert "statistic=contribution" in row.failed
    with pytest.raises(UnreachableError, match="contribution"):
        Search(subject, progress=False).for_mean(4.0, winner())


def test_the_fewest_experts_within_a_loss(subject):
    search = Search(subject, progress=False)
    family = FAMILIES[0]
    chosen = search.within_loss(0.05, family)
    native = subject.measure(VALIDATION, Family("topk", {"rule": "topk"}), PER_LAYER_NATIVE)
    bootstrap = search._bootstraps[VALIDATION]
    assert bootstrap.compare(chosen.row.sums, native.sums).relative_high <= 0.05
    fewer = chosen.config.replaced(target_experts=chosen.config.target_experts - 0.25)
    row = subject.measure(VALIDATION, family, fewer)
    assert bootstrap.compare(row.sums, native.sums).relative_high > 0.05
    with pytest.raises(UnreachableError, match="larger --max-loss"):
        search.within_loss(1e-9, family)


PER_LAYER_NATIVE = Family("topk", {"rule": "topk"}).at(8, 8)


def test_static_per_layer_takes_what_its_layers_lose_least_by(subject):
    tried = Search(subject, progress=False)._try(PER_LAYER, 3.0)
    assert sum(tried.config.counts_per_layer) == 12
    assert tried.row.mean_experts == pytest.approx(3.0)


def test_two_goals_or_none_are_refused(subject):
    with pytest.raises(ParameterError, match="one goal"):
        tune(subject, progress=False)
    with pytest.raises(ParameterError, match="one goal"):
        tune(subject, target_experts=4, max_loss=0.1, progress=False)
    with pytest.raises(ParameterError, match="preset must be search or winner"):
        tune(subject, target_experts=4, preset="best", progress=False)


def test_a_file_is_cut_into_three_parts(tmp_path, paragraphs):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(paragraphs[:50]), encoding="utf-8")
    found = Splits.of_file(path)
    assert [*found.calibration, *found.validation, *found.confirmation] == paragraphs[:50]
    assert len(found.validation) == LEAST_DOCUMENTS
    path.write_text("\n\n".join(paragraphs[:49]), encoding="utf-8")
    with pytest.raises(DataError, match=r"49 paragraphs, too few .* at least 50 that differ"):
        Splits.of_file(path)


@pytest.mark.parametrize(
    "repeat",
    [
        lambda part: part,
        lambda part: part.upper(),
        lambda part: f"  {part.replace(' ', '   ')} ",
        lambda part: part.replace(" ", "\n"),
    ],
)
def test_unseen_text_is_unseen_by_content(repeat, tmp_path, paragraphs):
    """Equal paragraphs are one document, in one part."""
    path = tmp_path / "text.txt"
    several = paragraphs[:60]
    path.write_text("\n\n".join([*several, *map(repeat, several)]), encoding="utf-8")
    found = Splits.of_file(path)
    assert [*found.calibration, *found.validation, *found.confirmation] == several
    [note] = found.notes
    assert note.startswith("60 paragraphs repeat earlier ones and were left out")
    path.write_text("\n\n".join([*paragraphs[:3]] * 30), encoding="utf-8")
    with pytest.raises(DataError, match=r"3 paragraphs that differ, and 87 that repeat others"):
        Splits.of_file(path)


def test_many_families_get_a_first_look_on_little_text(
    tiny, tokenizer, splits, tmp_path, monkeypatch
):
    monkeypatch.setattr(subject_module, "SCREEN_TOKENS", 400)
    subject = Subject(tiny, tokenizer, "tiny-olmoe", splits, tmp_path, {}, **SMALL)
    monkeypatch.setattr("lm_eval_bh.policies.tuning.search.FINALISTS", 2)
    monkeypatch.setattr("lm_eval_bh.policies.tuning.search.WITH_GAINS", 1)
    families = [*FAMILIES, named("by"), named("p_value weight")]
    search = Search(subject, families, progress=False)
    chosen = search.for_mean(4.0)
    looked = {tried.family.name: tried for tried in search.screened.values()}
    assert {"min_w weight", "top_p", "by"} <= looked.keys()
    assert looked["by"].row.failed is not None
    measured = [name for name, tried in looked.items() if tried.difference is not None]
    measured.remove("p_value weight")  # the same policy as min_w: it takes no place of another
    assert "p_value weight mass 0.2" not in measured
    measured.sort(key=lambda name: looked[name].difference.relative)
    assert any("mass" in name for name in measured)
    assert max(len(GAINS.keys() & tried.family.options) for tried in looked.values()) == 2
    went_on = {tried.family.name for tried in search.tried.values() if tried.family.adaptive}
    assert went_on == {*measured[:2], winner().name}
    tokens = [subject.documents[text].tokens.sum() for text in (SCREEN, VALIDATION)]
    assert tokens[0] <= tokens[1]
    assert chosen.family.name in {tried.family.name for tried in search.tried.values()}


def test_what_is_confirmed_elsewhere_is_unseen_by_content(splits, paragraphs, tmp_path):
    path = tmp_path / "other.txt"
    own = [f"A paragraph that is nobody's, number {number}." for number in range(12)]
    seen = splits.calibration[0].upper()
    part = f"Something new.\n{splits.validation[0]}\nAnd more."
    path.write_text("\n\n".join([*own, seen, part, own[0]]), encoding="utf-8")
    found = splits.confirmed_on(path)
    assert list(found.confirmation) == own
    assert (found.calibration, found.validation) == (splits.calibration, splits.validation)
    assert found.digest != splits.digest
    assert [note.split()[0] for note in found.notes] == ["1", "2"]
    path.write_text("\n\n".join([*own[:9], *splits.calibration[:3]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"9 unseen paragraphs; 3 others share lines with demo"):
        splits.confirmed_on(path)
