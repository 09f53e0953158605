"""The report, as files and in a browser."""

from __future__ import annotations

import base64
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser_pages import assert_fits
from lm_eval.utils import simple_parse_args_string
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from lm_eval_bh.analysis.show.lm_eval_command import lm_eval_command
from lm_eval_bh.analysis.show.report_page import escape_markdown, fenced, write_report
from lm_eval_bh.analysis.show.report_tables import number, p_value
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.cli.app import app
from lm_eval_bh.harness.arguments import routing_config
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.policy import described
from lm_eval_bh.schema import read_json

LAMBADA, HELLASWAG = "bh_lambada", "bh_hellaswag"
EVIL = "evil<script>alert(1)</script>|`x`*y*"
VOID = {"meta", "img", "input", "br"}


@pytest.fixture(scope="module")
def runs(new_writer, tmp_path_factory) -> Path:
    """Return the model's own top-4, top-2, and a BH between them that is half a percent worse."""
    write = new_writer(tmp_path_factory.mktemp("runs"))
    write("top4", rule="topk", max_k=4)
    write("top2", rule="topk", max_k=2, loss=2.2)
    write("bh", loss=(2.005, 2.006, 2.004, 2.005), right=(1, 0, 0, 0), log=True)
    return write.folder


@pytest.fixture(scope="module")
def output(runs, tmp_path_factory) -> Path:
    """Return the folder of their report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(load_experiments([runs]), folder, resamples=200)
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """Leave the figures out, which take longest."""
    monkeypatch.setattr("lm_eval_bh.analysis.show.report_page._figures", lambda loaded, folder: [])


def read(folder: Path) -> tuple[str, str]:
    names = ("bh_routing_report.md", "bh_routing_report.html")
    return tuple((folder / name).read_text(encoding="utf-8") for name in names)


def written(folder: Path, output: Path, **options) -> tuple[str, str]:
    write_report(load_experiments([folder]), output, resamples=200, **options)
    return read(output)


class Page(HTMLParser):
    """Parses a page for tests; every element must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_markdown_holds_every_part(output):
    text, _ = read(output)
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    titles = [
        tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"
    ]
    assert titles == [
        "Routing report",
        "Recommendation",
        "Results",
        "Figure",
        "Significance",
        "Speed",
        "Layers",
        "Calibration",
        "Run it again",
    ]
    rows = [token for token in tokens if token.type == "tr_open"]
    verdicts, results, comparisons, layers = 1 + 3, 1 + 9, 1 + 2 * 4, 1 + 9
    assert len(rows) == verdicts + results + comparisons + layers
    assert len([token for token in tokens if token.type == "fence"]) == 9 + 1
    picture = output / re.search(r"!\[[^]]*\]\((.*)\)", text)[1]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_recommendation_and_static_top_k_beside_it(runs, output):
    frame = load_experiments([runs]).frame
    row = frame[(frame["task"] == LAMBADA) & frame["adaptive"]].iloc[0]
    for text in read(output):
        assert "Use BH a=0.40, max 4" in text
        assert f"{row['matched_perplexity']:.3f}" in text
        assert "interpolated, k = 2 to 4" in text
        assert "2 of them have the lower perplexity" in text


def test_margin_is_an_argument(runs, tmp_path, no_figures):
    markdown, _ = written(runs, tmp_path, margin=0.001)
    assert "No configuration with fewer experts qualifies: stay with top-4" in markdown
    assert "at most 0.1 % worse" in markdown


def test_page_is_well_formed_and_needs_nothing_else(output):
    _, text = read(output)
    page = Page(text)
    assert page.open == []
    for name, attributes in page.elements:
        assert name not in ("link", "iframe", "object", "base")
        for attribute in ("src", "href", "action", "srcset"):
            assert (attributes.get(attribute) or "#").startswith(
                ("#", "data:image/svg+xml;base64,")
            )
    assert "default-src 'none'" in text
    assert "http://" not in text
    assert "https://" not in text
    picture = base64.b64decode(page.all("img")[0]["src"].partition(",")[2])
    assert b"<svg" in picture
    assert page.all("img")[0]["alt"]


def test_page_is_accessible(output):
    page = Page(read(output)[1])
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == len(page.all("main")) == 1
    assert len(page.all("caption")) == len(page.all("table"))
    assert {th["scope"] for th in page.all("th")} == {"col", "row"}
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = {a["href"].removeprefix("#") for a in page.all("a")}
    assert targets <= set(ids)
    assert {f"run-{i}" for i in range(1, 10)} <= targets


def test_nothing_from_files_is_markup(write, tmp_path, no_figures):
    write("top4", rule="topk", max_k=4, pretrained=EVIL)
    write("bh", pretrained=EVIL, alpha=0.3)
    (write.folder / "results_<b>.json").write_text("{}")
    markdown, html = written(write.folder, tmp_path / "out")
    page = Page(html)
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert any(EVIL in text for text in page.texts)
    rendered = Page(MarkdownIt("commonmark").enable("table").render(markdown))
    assert not rendered.all("script")
    assert not rendered.all("em")
    assert any(EVIL in text for text in rendered.texts)
    assert "results_<b>.json" in "".join(page.texts)


@pytest.mark.parametrize(
    "text", ["a|b", "<b>", "`x`", "*a*", "[a](b)", "a\nb", "\\", "~~a~~", "&lt;"]
)
def test_escaped_markdown_shows_the_text(text):
    shown = Page(MarkdownIt("commonmark").enable("table").render(f"x {escape_markdown(text)}"))
    assert "".join(shown.texts).strip() == f"x {' '.join(text.split())}"
    assert [name for name, _ in shown.elements] == ["p"]


def test_a_fence_is_longer_than_any_in_the_text():
    tokens = MarkdownIt("commonmark").parse(fenced("a\n````\nb"))
    assert [(token.type, token.content) for token in tokens] == [("fence", "a\n````\nb\n")]


def test_twice_the_same(runs, output, tmp_path):
    # matplotlib's rounding of a layout varies.
    drawing = re.compile('base64,[^"]*')
    for one, other in zip(written(runs, tmp_path), read(output), strict=True):
        assert drawing.sub("", one) == drawing.sub("", other)


def test_a_single_run_of_the_stock_model(write, tmp_path, no_figures):
    write("hf", model="hf")
    for text in written(write.folder, tmp_path / "out"):
        assert "There is nothing to compare" in text
        assert "No run logged its layers" in text
        assert "No run used a null model" in text
        assert "The unchanged model is the only configuration" in text


def test_what_cannot_be_compared_is_reported_in_groups(write, tmp_path):
    write("one", rule="topk", max_k=4)
    write("two", rule="topk", max_k=4, change=lambda content: content.update(max_length=32))
    loaded = load_experiments([write.folder], force=True)
    markdown, html = (p.read_text() for p in write_report(loaded, tmp_path, resamples=200))
    assert "### Group 1" in markdown
    assert "### Group 2" in markdown
    assert len(Page(html).all("img")) == 2
    assert len(list((tmp_path / "visualizations").iterdir())) == 2


def test_health_of_the_null_model_is_shown_where_it_is_recorded(write, tmp_path, no_figures):
    health = [{"layer": 0, "ks_distance": 0.0123, "tokens": 4096}]
    health[0] |= {"ceiling_share": 0.001, "floor_share": 0.00002}

    def record(content):
        content["config"]["bh"]["null_model"]["health"] = health

    write("bh", change=record)
    write("by", rule="by", change=record)
    markdown, html = written(write.folder, tmp_path / "out")
    assert "(visualizations/null_model_health.png)" in markdown
    assert [path.name for path in tmp_path.glob("out/visualizations/*")] == [
        "null_model_health.png"
    ]
    (image,) = Page(html).all("img")
    assert "Kolmogorov-Smirnov" in image["alt"]
    for text in (markdown, html):
        assert "On held-out text" in text
        assert "0.0123" in text
        assert "0.100" in text
        assert "0.002" in text
        assert "lm-eval-bh calibrate" not in text


def test_nothing_but_broken_files(tmp_path):
    (tmp_path / "results_broken.json").write_text("{")
    for text in written(tmp_path, tmp_path / "out"):
        assert "No experiment could be read" in text
        assert "broken.json" in text
    done = CliRunner().invoke(app, ["report", "--patterns", str(tmp_path)])
    assert done.exit_code == 3


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (float("nan"), ""),
        (float("inf"), "∞"),
        (3.14159, "3.142"),
        (16.756, "16.76"),
        (1584670.2, "1,584,670"),
        (0.01234, "0.0123"),
        (8.0, "8"),
    ],
)
def test_numbers_have_four_digits_that_count(value, shown):
    assert number(value).text == shown


def test_p_values():
    assert [p_value(p).text for p in (None, 0.0001, 0.25)] == ["", "< 0.001", "0.250"]


@pytest.mark.parametrize(
    ("config", "rest"),
    [
        ({"model_args": {"pretrained": "tiny-olmoe", "alpha": 0.4, "max_k": 8}}, {}),
        ({"model_args": {"pretrained": "a model's", "kde": "x,y.safetensors"}, "limit": 0.25}, {}),
        ({"model_args": {"pretrained": "m"}, "gen_kwargs": {"temperature": 0.5}}, {}),
        ({"model_args": {"pretrained": "m"}, "limit": 40, "batch_size": "auto"}, {}),
        ({"model_args": {"pretrained": "m"}, "fewshot_seed": 7}, {"n-shot": {LAMBADA: 5}}),
        (
            {"model_args": {"pretrained": "m"}},
            {"chat_template_sha": "a", "fewshot_as_multiturn": True, "system_instruction": "Be."},
        ),
    ],
)
def test_lm_eval_understands_the_command(config, rest):
    from lm_eval._cli.harness import HarnessCLI

    config = {"model": "hf-bh", "device": "cpu"} | config
    program, *words = shlex.split(lm_eval_command({"config": config} | rest, LAMBADA))
    assert program == "lm_eval"
    understood = HarnessCLI()._parser.parse_args(["run", *words])
    assert understood.model == "hf-bh"
    assert understood.model_args == config["model_args"]
    assert understood.tasks in (LAMBADA, [LAMBADA])
    assert understood.limit == config.get("limit")
    assert understood.device == "cpu"
    assert understood.num_fewshot == rest.get("n-shot", {}).get(LAMBADA)
    assert (understood.gen_kwargs or None) == config.get("gen_kwargs")
    assert understood.system_instruction == rest.get("system_instruction")
    assert getattr(understood, "apply_chat_template", False) == ("chat_template_sha" in rest)
    if "fewshot_seed" in config:
        assert understood.seed == [0, 1234, 1234, 7]


def test_routing_is_spelt_out_where_the_model_was_given_as_an_object():
    routing = {"rule": "topk", "alpha": 0.4, "min_k": 4, "max_k": 4}
    content = {"config": {"model": "hf-bh", "bh": {"config": routing}}, "model_name": "some/model"}
    assert "--model_args pretrained=some/model,rule=topk,max_k=4 " in lm_eval_command(content, "t")


@pytest.mark.parametrize(
    "wanted",
    [
        *({"rule": rule} for rule in METHODS),
        {"rule": "bh", "trim": 2, "null_scope": "expert", "statistic": "contribution"},
        {"rule": "top_p", "statistic": "contribution"},
        {"rule": "random_k", "seed": 7},
        {"rule": "bh", "target_experts": 4.5},
        {"rule": "min_p", "target_experts": 3, "budget": "layer"},
    ],
    ids=str,
)
def test_routing_that_is_spelt_out_is_accepted_and_the_same(wanted):
    if "target_experts" not in wanted and METHODS[wanted["rule"]].alpha:
        wanted = wanted | {"alpha": 0.3}
    config = routing_config(wanted | {"max_k": 6})
    written = described(config, None)
    if config.target_experts is not None:  # as BHRoutingIntegration.describe() has it
        written |= {"alpha": 0.62, "solved": {"alphas": {"0": 0.6, "1": 0.64}}}
    bh = {"config": written, "rule": METHODS[config.rule].describe()}
    content = {
        "config": {"model": "some/model", "model_args": None, "bh": bh},
        "model_source": "CUSTOM",  # as lm-eval has it of an object
        "model_name": "i82qcls7",
    }
    words = shlex.split(lm_eval_command(content, LAMBADA))
    assert words[words.index("--model") + 1] == "hf-bh"
    given = simple_parse_args_string(words[words.index("--model_args") + 1])
    assert given.pop("pretrained") == "some/model"
    assert routing_config(given) == config


def test_command_line(write, tmp_path, no_figures):
    write("top4", rule="topk", max_k=4)
    done = CliRunner().invoke(app, ["report", str(write.folder), "--resamples", "100"])
    assert done.exit_code == 0, done.output
    assert (write.folder / "bh_routing_report.html").is_file()
    (write.folder / "results_broken.json").write_text("{")
    done = CliRunner().invoke(
        app, ["report", str(write.folder), "--output-dir", str(tmp_path / "o")]
    )
    assert done.exit_code == 3
    assert "results_broken.json" in done.output
    assert "results_broken.json" in "".join(Page(read(tmp_path / "o")[1]).texts)


@pytest.fixture
def page(browser, output):
    browser.get((output / "bh_routing_report.html").as_uri())
    return browser


def column(page, title: str) -> list[str]:
    """Return what a column of the experiments shows, from top to bottom."""
    return page.execute_script(
        """
        const table = document.getElementById("experiments");
        const place = [...table.tHead.rows[0].cells].findIndex(
            cell => cell.textContent === arguments[0]);
        return [...table.tBodies[0].rows].filter(row => row.offsetParent !== null)
            .map(row => row.cells[place].textContent);
        """,
        title,
    )


def header(page, title: str):
    return page.find_element(
        "xpath", f"//table[@id='experiments']//th[normalize-space()='{title}']"
    )


@pytest.mark.slow
def test_sorting_in_a_browser(page, runs):
    frame = load_experiments([runs]).frame
    experts = [f"{value:.2f}" for value in sorted(frame["avg_experts_model"])]
    assert column(page, "experts") != experts
    button = header(page, "experts").find_element("tag name", "button")
    button.click()
    assert column(page, "experts") == experts
    assert header(page, "experts").get_attribute("aria-sort") == "ascending"
    button.send_keys(" ")  # by keyboard too
    assert column(page, "experts") == experts[::-1]
    assert header(page, "experts").get_attribute("aria-sort") == "descending"
    header(page, "perplexity").find_element("tag name", "button").click()
    assert header(page, "experts").get_attribute("aria-sort") == "none"
    shown = column(page, "perplexity")
    assert shown == [*sorted(filter(None, shown)), "", "", ""]  # what was not measured comes last


@pytest.mark.slow
def test_filtering_in_a_browser(page):
    from selenium.webdriver.support.ui import Select

    form = page.find_element("id", "filter")
    count = form.find_element("tag name", "output")
    assert count.text == "9 of 9 experiments"
    Select(form.find_element("name", "task")).select_by_visible_text(LAMBADA)
    assert column(page, "task") == [LAMBADA] * 3
    Select(form.find_element("name", "kind")).select_by_visible_text("adaptive")
    assert column(page, "configuration") == ["BH a=0.40, max 4"]
    assert count.text == "1 of 9 experiments"
    assert column(page, "accuracy") == ["0.250 ± 0.125"]
    Select(form.find_element("name", "kind")).select_by_visible_text("all")
    form.find_element("name", "words").send_keys("TOP-2 lamb")
    assert column(page, "configuration") == ["top-2"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_its_window_and_loads_nothing(page, width, scheme):
    assert_fits(page, width, scheme)
    assert page.execute_script("return document.querySelector('img').naturalWidth") > 0
    assert page.get_log("browser") == []
    requested = [
        url
        for entry in page.get_log("performance")
        for url in re.findall(r'"requestWillBeSent".*?"url":"([^"]*)"', entry["message"])
    ]
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []


@pytest.mark.slow
def test_real_files(real_runs, tmp_path, no_figures):
    markdown, html = written(real_runs, tmp_path)
    assert "stay with top-8 (hf)" in markdown
    assert "WikiText" in html or "wikitext" in html
    content = read_json(next((real_runs / "bh").rglob("results_*.json")))
    command = lm_eval_command(content, "bh_demo_wikitext")
    assert command in markdown
    assert "pretrained=tiny-olmoe,alpha=0.4,log_routing=samples" in command
    assert HELLASWAG.replace("bh_", "bh_demo_") in html
