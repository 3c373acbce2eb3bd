"""The chat page in a real Chromium, by its DevTools pipe: a person types, reads, stops."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from serving.http.server import SECURITY
from tests.serving.fake_engine import FakeEngine, letters, served, spelling, until

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
REPLY = "Grüße <b>an</b> alle 👍"
# A process whose descriptors 3 and 4 become those given, then the rest of its arguments.
AS_DESCRIPTORS = """
import fcntl, os, sys
high = [fcntl.fcntl(int(given), fcntl.F_DUPFD, 10) for given in sys.argv[1:3]]
os.dup2(high[0], 3)
os.dup2(high[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
needs_chromium = pytest.mark.skipif(
    BROWSER is None and "CAMBRIAN_REQUIRE_CHROMIUM" not in os.environ,
    reason="needs Chromium: apt-get install chromium",
)


class Page:
    """A page in a headless browser: JSON messages, a zero byte behind each, to descriptor 3 and from 4."""

    def __init__(self, url, profile):
        assert BROWSER, "CAMBRIAN_REQUIRE_CHROMIUM is set, and there is none: apt-get install chromium"
        (read, self._to), (self._from, write) = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command = [BROWSER, *flags, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", AS_DESCRIPTORS, str(read), str(write), *command],
            pass_fds=(read, write),
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._count, self._rest, self._session = 0, b"", None
        target = self._call("Target.createTarget", url=url)["targetId"]
        found = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]

    def _call(self, method, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            one, zero, self._rest = self._rest.partition(b"\0")
            if not zero:
                self._rest = one + os.read(self._from, 1 << 16)
                continue
            answer = json.loads(one)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression):
        """What a piece of JavaScript comes to."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def type(self, text):
        """Write into the field that has the focus, and press Enter."""
        self._call("Input.insertText", text=text)
        self.press("Enter", 13)

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def texts(self):
        """(kind, text) of what stands in the log."""
        script = (
            "[...document.querySelectorAll('article')].map(a => [a.className, a.children[1].textContent])"
        )
        return self.value(script)

    def close(self):
        """End the browser."""
        self._process.terminate()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)


@pytest.fixture
def page(tmp_path):
    pages = []

    def opened(client):
        pages.append(Page(f"http://127.0.0.1:{client.port}/", tmp_path / "profile"))
        until(lambda: pages[0].value("document.getElementById('name')?.textContent") == "tiny", 60)
        until(lambda: pages[0].value("document.hasFocus() && document.activeElement.tagName") == "TEXTAREA")
        return pages[0]

    yield opened
    for one in pages:
        one.close()


@needs_chromium
def test_a_text_is_gone_on_with_as_it_comes_and_is_never_markup(page):
    with served(FakeEngine(spelling(REPLY))) as client:
        shown = page(client)
        shown.type("Alle ")
        until(lambda: not shown.value("document.getElementById('stop').disabled === false"))
        until(lambda: shown.texts() == [["user", "Alle "], ["model", "Alle " + REPLY]])
        assert shown.value("document.querySelectorAll('article b').length") == 0
        assert "tokens" in shown.value("document.getElementById('note').textContent")


@needs_chromium
def test_escape_stops_and_the_engine_hears_of_it(page):
    with served(FakeEngine(letters, max_len=100_000, pause=0.01)) as client:
        shown = page(client)
        shown.value("document.getElementById('tokens').value = 50000")
        shown.type("a")
        until(lambda: len(shown.texts()) == 2 and len(shown.texts()[1][1]) > 5)
        shown.press("Escape", 27)
        until(lambda: client.engine.held == 0 and client.service.open == 0)
        assert "stopped" in shown.value("document.getElementById('note').textContent")


@needs_chromium
def test_a_refusal_is_shown(page):
    with served(FakeEngine()) as client:
        shown = page(client)
        client.service.draining = True
        shown.type("a")
        until(lambda: any(kind == "error" and "about to end" in text for kind, text in shown.texts()))


def test_the_page_is_one_file_that_fetches_only_from_its_server():
    with served(FakeEngine()) as client:
        status, text, headers = client.ask("/")
    assert status == 200 and headers["content-security-policy"] == SECURITY
    for word in ("http:", "https:", "//cdn", "<link", "src=", "@import", "innerHTML", "eval("):
        assert word not in text, word
    assert "lang=" in text and "aria-live" in text and "prefers-color-scheme: dark" in text
