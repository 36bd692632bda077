"""A page opened in Chromium without a network: what it draws, what it complains of, where its text lies.

`opened` is the quick way: the document after its scripts ran. `Browser` speaks the DevTools protocol over a pipe, which
gives true widths (a headless window is never narrower than 500 pixels), both colour schemes, and screenshots.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCRIPT = Path(__file__).with_name("browser_measure.js")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--hide-scrollbars", "--disable-background-networking", "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
FLAGS = ("--headless", *QUIET, "--enable-logging=stderr", "--virtual-time-budget=30000")
WIDTHS, SCHEMES = (1280, 480), ("light", "dark")
HEIGHT = 900
LEAST_CONTRAST = 4.5
ANSWER_SECONDS = 120.0
FITTING = """[...document.querySelectorAll(".plot")].every((one) => {
  const svg = one.querySelector(".main-svg");
  return svg && Math.abs(svg.getBoundingClientRect().width - one.clientWidth) < 2;
})"""


def _program() -> str:
    """Chromium's path; skips the test where there is none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    return browser


def opened(page: Path, folder: Path) -> str:
    """The page's document after its scripts ran without a word on the console; skips where there is no Chromium."""
    command = [_program(), *FLAGS, f"--user-data-dir={folder}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


def drawn(document: str, name: str) -> str:
    """What plotly drew of the figure of that name in an `opened` document."""
    return document.partition(f'id="figure-{name}"')[2].partition("<script")[0]


class Pipe:
    """Messages of the DevTools protocol: JSON that ends in a zero byte."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes, self._rest, self._next = reads, writes, b"", 0
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; what happens meanwhile goes to `events`."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._next:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + ANSWER_SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reads], [], [], max(0.0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            data = os.read(self._reads, 1 << 20)
            assert data, "Chromium ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


class View:
    """One page in one tab. `messages` is everything that its console said."""

    def __init__(self, pipe: Pipe, page: Path, *, width: int, scheme: str) -> None:
        self._pipe = pipe
        target = pipe.ask("Target.createTarget", url="about:blank")["targetId"]
        self._target = target
        self._session = pipe.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._do(f"{domain}.enable")
        self._resize(width)
        self._emulate(scheme)
        self._do("Page.navigate", url=page.as_uri())
        self.wait("document.readyState === 'complete' && document.documentElement.dataset.drawn !== undefined")
        self._settle()

    def _do(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._pipe.ask(method, self._session, **parameters)

    def _resize(self, width: int, height: int = HEIGHT) -> None:
        self._do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def _emulate(self, scheme: str) -> None:
        self._do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def _settle(self) -> None:
        """Wait until every figure has the width of its place."""
        self.wait(FITTING)

    def set_scheme(self, scheme: str) -> None:
        """Change the reader's setting and wait until the figures followed."""
        self._emulate(scheme)
        self.wait(f"document.documentElement.dataset.drawn === '{scheme}'")
        self._settle()

    def set_width(self, width: int) -> None:
        """Change the width and wait until the figures followed."""
        self._resize(width)
        self._settle()

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self._do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a condition holds in the page."""
        end = time.monotonic() + ANSWER_SECONDS
        while self.evaluate(condition) is not True:
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.05)

    def faults(self) -> dict[str, list[str]]:
        """What is wrong with the page as it is seen now: overlaps, cut text, overflow, contrast."""
        found: dict[str, list[str]] = self.evaluate(f"({SCRIPT.read_text()})({LEAST_CONTRAST})")
        assert found.pop("texts"), "the page shows no text"
        return {name: told for name, told in found.items() if told}

    @property
    def messages(self) -> list[str]:
        """What the console said, exceptions included."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        mine = [one for one in self._pipe.events if one.get("sessionId") == self._session]
        return [json.dumps(one["params"])[:400] for one in mine if one["method"] in kinds]

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        whole = self._do("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(whole["data"]))

    def close(self) -> None:
        """Close the tab."""
        self._pipe.ask("Target.closeTarget", targetId=self._target)


class Browser:
    """A running Chromium; use `browser`."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    @contextmanager
    def view(self, page: Path, *, width: int = WIDTHS[0], scheme: str = SCHEMES[0]) -> Iterator[View]:
        """Open a page at a width and under a colour scheme."""
        shown = View(self._pipe, page, width=width, scheme=scheme)
        yield shown
        shown.close()


def _high(number: int) -> int:
    """A copy of a file descriptor that is none of those which the browser is given."""
    copy = fcntl.fcntl(number, fcntl.F_DUPFD, 10)
    os.close(number)
    return copy


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile in `folder`; skips where there is none."""
    program = _program()
    (its_read, writes), (reads, its_write) = (tuple(map(_high, os.pipe())) for _ in range(2))
    redirected = f'exec "$@" 3<&{its_read} 4>&{its_write}'
    command = [program, "--headless=new", *QUIET, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", redirected, "bash", *command],
        pass_fds=(its_read, its_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(its_read)
    os.close(its_write)
    pipe = Pipe(reads, writes)
    try:
        yield Browser(pipe)
        pipe.ask("Browser.close")
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait(timeout=30)
        os.close(reads)
        os.close(writes)
