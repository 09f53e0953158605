"""The page that shows routing: its content and its use."""

from __future__ import annotations

import json
import re

import pytest
import torch
from browser_pages import assert_fits
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import lm_eval_bh
from lm_eval_bh import BHRoutingIntegration, DataError, ParameterError, RoutingConfig
from lm_eval_bh.resources import tiny_olmoe
from lm_eval_bh.viewing.routed_text import route_texts

TEXT = 'The tide is <b>high</b> & "low" </script>.\nThe Moon pulls the sea.'
TOP4 = RoutingConfig(rule="topk", max_k=4)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_olmoe())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=torch.float32)


@pytest.fixture(scope="module")
def two(model, tokenizer):
    """Return two texts under BH and static top-4."""
    routing = BHRoutingIntegration(model, alpha=0.4, max_k=8)
    return lm_eval_bh.view(routing, tokenizer, [TEXT, "Salt water."], against=TOP4)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])


def test_experts_weights_and_p_values_are_those_of_the_rule(model, tokenizer):
    ids = tokenizer.encode(TEXT)
    routing = BHRoutingIntegration(model, alpha=0.4, max_k=8)
    heard = {}
    with routing:
        routing.observers.append(lambda layer, *both: heard.setdefault(layer, both))
        [found] = route_texts(routing, [ids])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
    losses = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    assert found["loss"] == [None, *(pytest.approx(loss, rel=1e-3) for loss in losses.tolist())]
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    for layer in found["layers"]:
        router_logits, selection = heard[layer["layer"]]
        p_values = routing.null_model.p_values(layer["layer"], router_logits)
        assert layer["counts"] == selection.counts.tolist()
        assert (layer["score"], layer["limit"]) == ("p-value", "critical value")
        for token, (count, rows) in enumerate(zip(layer["counts"], layer["rows"], strict=True)):
            assert len(rows) == count + 1
            assert [row[0] for row in rows[:count]] == selection.indices[token, :count].tolist()
            left_out = torch.ones(64, dtype=torch.bool)
            left_out[selection.indices[token, :count]] = False
            assert p_values[token, rows[count][0]] == p_values[token][left_out].min()
            for rank, (expert, weight, p_value, limit) in enumerate(rows, start=1):
                assert p_value == pytest.approx(float(p_values[token, expert]), rel=1e-3)
                assert limit == pytest.approx(0.4 * rank / 64, rel=1e-3)
                softmax = router_logits[token].softmax(-1)[expert]
                assert weight == pytest.approx(float(softmax), rel=1e-3)
            critical = 0.4 * torch.arange(1, 65) / 64
            passed = (p_values[token].sort().values <= critical).nonzero()
            rejected = int(passed.max()) + 1 if len(passed) else 0
            assert count == min(max(rejected, 1), 8)


@pytest.mark.parametrize(
    ("config", "score", "limit"),
    [
        (RoutingConfig(rule="top_p", alpha=0.2), "weights so far", "to reach"),
        (RoutingConfig(rule="min_p", alpha=0.5), "share", "threshold"),
        (RoutingConfig(rule="min_w", alpha=0.03, statistic="weight"), "score", "threshold"),
        (RoutingConfig(rule="p_value", alpha=0.05), "p-value", "critical value"),
        (RoutingConfig(rule="holm", alpha=0.9), "p-value", "critical value"),
        (RoutingConfig(rule="storey", alpha=0.4), "p-value", None),
        (RoutingConfig(rule="random_k", max_k=3), None, None),
        (RoutingConfig(alpha=0.4, statistic="contribution"), "p-value", "critical value"),
        (RoutingConfig(alpha=0.4, layers="1-2"), "p-value", "critical value"),
    ],
)
def test_every_rule_shows_what_it_decides_by(model, tokenizer, config, score, limit):
    routing = BHRoutingIntegration(model, config, tokenizer=tokenizer)
    with routing:
        [found] = route_texts(routing, [tokenizer.encode(TEXT)])
    assert [layer["layer"] for layer in found["layers"]] == routing.layers
    for layer in found["layers"]:
        assert (layer["score"], layer["limit"]) == (score, limit)
        for count, rows in zip(layer["counts"], layer["rows"], strict=True):
            scores = [row[2] for row in rows]
            limits = [row[3] for row in rows]
            if not limit or score == "p-value":
                continue
            if config.min_k < count < config.max_k and score != "weights so far":
                assert scores[count - 1] >= limits[count - 1]
                assert scores[count] < limits[count]
            elif score == "weights so far" and count < config.max_k:
                assert scores[count - 1] >= limits[count - 1]
                assert count == 1 or scores[count - 2] < limits[count - 2]


def test_the_integration_is_left_as_it_was(model, tokenizer):
    routing = BHRoutingIntegration(model, alpha=0.4, max_k=8)
    lm_eval_bh.view(routing, tokenizer, "Salt water.", against=TOP4)
    assert not routing.patched
    assert routing.config.alpha == 0.4
    assert routing.observers == []
    with routing:
        lm_eval_bh.view(routing, tokenizer, "Salt water.", against=TOP4)
        assert routing.patched
        assert routing.config.rule == "bh"


def test_page_holds_the_texts_and_nothing_of_them_runs(two, tmp_path):
    page = two.save(tmp_path / "view.html").read_text(encoding="utf-8")
    data = data_of(page)
    assert "".join(data["texts"][0]["tokens"]) == TEXT
    assert [run["label"] for run in data["runs"]] == ["BH a=0.40, max 8", "top-4"]
    assert page.count("</script>") == 2
    assert "default-src 'none'" in page
    assert "http://" not in page
    assert "https://" not in page


def test_a_notebook_shows_it_in_a_frame(two):
    shown = two._repr_html_()
    assert shown.startswith("<iframe")
    assert shown.count("<") == 2  # the page is an attribute
    assert "Routing of tiny-olmoe" in shown
    assert len(repr(two)) < 100


@pytest.mark.parametrize(
    ("arguments", "options", "part"),
    [
        ([""], {}, "no tokens"),
        ([[]], {}, "not empty"),
        ([[3]], {}, "must be a string"),
        (["The sea."], {"tokens": 1}, "tokens must be"),
        (["The sea."], {"against": 4}, "must be a RoutingConfig"),
        (["The sea."], {"against": RoutingConfig(layers="0")}, "different layers"),
    ],
)
def test_what_cannot_be_shown_is_refused(model, tokenizer, arguments, options, part):
    routing = BHRoutingIntegration(model, alpha=0.4, max_k=8)
    with pytest.raises((DataError, ParameterError), match=part):
        lm_eval_bh.view(routing, tokenizer, *arguments, **options)
    assert routing.config.layers == "all"


def test_an_unpatched_model_has_decided_nothing(model):
    with pytest.raises(ParameterError, match="not patched"):
        route_texts(BHRoutingIntegration(model, alpha=0.4), [[1, 2]])


@pytest.mark.parametrize("rule", ["topk", "oea", "batch_min_w"])
def test_texts_that_are_decoded_together_share_their_steps(model, tokenizer, rule):
    texts = [TEXT, "Salt water.", "The river runs to the sea."]
    routing = BHRoutingIntegration(model, RoutingConfig(rule=rule, decode_batch=2))
    together = lm_eval_bh.view(routing, tokenizer, texts)
    distinct = routing.counters.mean_distinct()
    line = f"{distinct:.1f} distinct experts per layer and step of 2 rows"
    assert together.runs[0]["distinct"] == line
    assert f", {line}</span>" in together.html
    for alone, row in ((texts[:1], 0), (texts[2:], 2)):
        [run] = lm_eval_bh.view(routing, tokenizer, alone).runs
        assert "per layer and step of 1 row" in run["distinct"]
        same = run["texts"][0] == together.runs[0]["texts"][row]
        assert same == (row == 2 or rule == "topk")  # the third text is a group by itself


def test_no_step_is_told_of_where_nothing_says_what_is_decoded_together(two):
    assert [run["distinct"] for run in two.runs] == [None, None]


@pytest.fixture(scope="module")
def file(two, tmp_path_factory):
    return two.save(tmp_path_factory.mktemp("view") / "view.html")


@pytest.fixture
def page(browser, file):
    browser.get(file.as_uri())
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def choose(page, name: str, text: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("name", name)).select_by_visible_text(text)


def token(page, number: int, line: int = 0):
    lines = page.find_elements("class name", "tokens")
    return lines[line].find_elements("class name", "token")[number]


def rows_of(page, run: int) -> list[list[str]]:
    return page.execute_script(
        "return [...document.querySelectorAll('.sides > div')[arguments[0]].querySelectorAll("
        "'tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))",
        run,
    )


@pytest.mark.slow
def test_choosing_a_layer_and_pointing_at_a_token(page, two):
    from selenium.webdriver import ActionChains

    layer = two.runs[0]["texts"][0]["layers"][2]
    choose(page, "layer", "layer 2")
    ActionChains(page).move_to_element(token(page, 5)).perform()
    loss = two.runs[0]["texts"][0]["loss"][5]
    text = page.find_element("id", "detail").text
    assert "Token 5" in text
    assert f"layer 2, token id {two.texts[0]['ids'][5]}, loss A {float(f'{loss:.3g}'):g}" in text
    shown, count = rows_of(page, 0), layer["counts"][5]
    assert [row[0] for row in shown[:count]] == [str(row[0]) for row in layer["rows"][5][:count]]
    assert shown[count][0] == f"{layer['rows'][5][count][0]}, left out"
    for cells, row in zip(shown, layer["rows"][5], strict=True):
        assert [float(cell) for cell in cells[1:]] == [pytest.approx(v, rel=6e-3) for v in row[1:]]
    assert len(rows_of(page, 1)) == 4 + 1
    assert token(page, 5).get_attribute("aria-label").endswith(f"{count} experts, other experts")


@pytest.mark.slow
def test_keys_choose_tokens_and_layers(page):
    from selenium.webdriver.common.keys import Keys

    first = token(page, 0)
    page.execute_script("arguments[0].focus()", first)
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN):
        page.switch_to.active_element.send_keys(key)
    assert page.switch_to.active_element == token(page, 2)
    assert page.find_element("name", "layer").get_attribute("value") == "0"
    assert "Token 2" in page.find_element("id", "detail").text
    page.switch_to.active_element.send_keys(Keys.END)
    number = len(page.find_elements("class name", "tokens")[0].find_elements("xpath", "*"))
    assert f"Token {number - 1} " in page.find_element("id", "detail").text
    second = token(page, 0, line=1)
    page.execute_script("arguments[0].focus()", second)
    assert "Token 0" in page.find_element("id", "detail").text


@pytest.mark.slow
def test_differences_are_marked(page, two):
    choose(page, "layer", "layer 0")
    a, b = (run["texts"][0]["layers"][0] for run in two.runs)

    def experts(layer, number):
        return {row[0] for row in layer["rows"][number][: layer["counts"][number]]}

    number = len(two.texts[0]["tokens"])
    different = [experts(a, t) != experts(b, t) for t in range(number)]
    for line in (0, 1):
        marked = page.execute_script(
            "return [...document.querySelectorAll('.tokens')[arguments[0]].children]"
            ".map(span => span.classList.contains('differs'))",
            line,
        )
        assert marked == different
    summary = page.find_element("id", "summary").text
    assert f"{sum(different)} of {number} tokens have different experts" in summary
    choose(page, "run", "B minus A")
    assert len(page.find_elements("class name", "tokens")) == 1
    labels = [
        span.get_attribute("aria-label").rsplit(": ", 1)[1].split()[0]
        for span in page.find_elements("css selector", ".tokens > .token")
    ]
    assert [int(label) for label in labels] == [4 - a["counts"][t] for t in range(number)]
    choose(page, "text", "document 2")
    choose(page, "colour", "loss")
    assert "no loss" in token(page, 0).get_attribute("aria-label")


@pytest.mark.slow
def test_a_cell_of_the_heat_map_chooses_layer_and_token(page):
    from selenium.webdriver import ActionChains

    box = page.find_elements("class name", "map")[0]
    page.execute_script("arguments[0].scrollIntoView({block: 'start'})", box)
    x, y = page.execute_script("return [LABEL + 7.5 * cell(), 3.5 * HEIGHT]")
    width, height = box.size["width"], box.size["height"]
    ActionChains(page).move_to_element_with_offset(
        box, int(x - width / 2), int(y - height / 2)
    ).click().perform()
    assert page.find_element("name", "layer").get_attribute("value") == "3"
    assert "Token 7" in page.find_element("id", "detail").text
    drawn = page.execute_script(
        "const data = arguments[0].getContext('2d').getImageData(0, 0, arguments[0].width,"
        " arguments[0].height).data; return new Set(data.filter((v, i) => i % 4 === 3)).size",
        box,
    )
    assert drawn > 2  # shades


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_its_window_by_day_and_night(page, width, scheme):
    assert_fits(page, width, scheme)
    if width == 390:  # a tap chooses
        page.execute_script("arguments[0].scrollIntoView({block: 'start'})", token(page, 4))
        token(page, 4).click()
        assert "Token 4" in page.find_element("id", "detail").text
