"""The page in a real browser: no script runs and nothing is asked for, even with hostile text in every field."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from report import hostile, samples

from flyweight.report import html

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium to render the page")


@contextmanager
def served(page: str) -> Iterator[tuple[str, list[str]]]:
    """The page on this machine's loopback, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page.encode() if self.path == "/page" else b"")

        def log_message(self, *args: object) -> None:
            """Nothing: the paths are kept."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def opened(address: str, profile: Path) -> str:
    """The document after the browser has rendered it."""
    assert BROWSER is not None
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    command = [
        BROWSER,
        *flags,
        f"--user-data-dir={profile}",
        "--virtual-time-budget=2000",
        "--dump-dom",
        address,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def attack(address: str) -> str:
    """All hostile strings, and one each that asks for something by script, picture and style."""
    asks = (
        f"<img src={address}/picture>",
        f"<script>fetch('{address}/script')</script>",
        f"<style>body{{background:url({address}/style)}}</style>",
        f"<iframe src={address}/frame></iframe>",
    )
    return " ".join((*asks, *hostile.STRINGS))


@pytest.mark.heavy
def test_hostile_text_runs_nothing_and_asks_for_nothing(
    tmp_path: Path, figure: Callable[[int, str], None]
) -> None:
    with served("") as (address, _):
        text = attack(address)
    result = samples.with_text(samples.met(9, 6), text)
    with served(html.render(result, text)) as (address, asked):
        dom = opened(f"{address}/page", tmp_path)
    assert "<title>broken" not in dom
    assert 'class="spot' in dom
    assert set(asked) <= {"/page", "/favicon.ico"}
    strings, size = len(hostile.STRINGS) + 4, len(html.render(samples.met(60, 300), text).encode())
    figure(
        28,
        f"{strings} strings in every field: 0 scripts run, 0 outside requests; 300 layers take {size:,} bytes",
    )


@pytest.mark.heavy
def test_the_check_would_notice(tmp_path: Path) -> None:
    """The control: the same strings in a careless page do run and do ask."""
    with served("<title>x</title><img src=/picture><script>document.title='broken'</script>") as (
        address,
        asked,
    ):
        dom = opened(f"{address}/page", tmp_path)
    assert "<title>broken" in dom
    assert "/picture" in asked
