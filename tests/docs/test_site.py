"""The site builds without a warning, loads nothing from elsewhere, and fits a phone."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from browser_pages import resize

ROOT = Path(__file__).resolve().parents[2]
LOADS = re.compile(
    r"<(?:script|img|iframe|source)[^>]* src=[\"']?(https?:)?//"
    r"|<link[^>]* rel=[\"']?(?:stylesheet|preconnect|icon|preload)[^>]* href=[\"']?(?:https?:)?//"
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    assert [page for page in pages if LOADS.search(page.read_text(encoding="utf-8"))] == []
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert not re.search(r"url\([\"']?(https?:)?//|@import", styles)


def test_generated_references_are_of_this_release(site):
    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    for shown in ("lm-eval-bh sweep", "--target-experts", "lm-eval-bh policy show"):
        assert shown in commands
    files = (site / "reference" / "files.html").read_text(encoding="utf-8")
    assert "population standard deviation" in files.lower()  # a comment of schema.py
    python = (site / "reference" / "api.html").read_text(encoding="utf-8")
    assert "BHRoutingIntegration" in python
    assert ":class:" not in python


def test_pages_ask_nobody_else_and_do_not_overflow_a_telephone(site, browser):
    handler = functools.partial(QuietHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    try:
        resize(browser, 390)
        for page in site.rglob("*.html"):
            browser.get(home + page.relative_to(site).as_posix())
            width = browser.execute_script("return document.documentElement.scrollWidth")
            assert width <= 390, page
            asked = browser.execute_script(
                "return performance.getEntriesByType('resource').map(entry => entry.name)"
            )
            assert [name for name in asked if not name.startswith((home, "data:"))] == [], page
    finally:
        server.shutdown()
        server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder silently."""

    def log_message(self, *_: object) -> None:
        pass
