"""A headless Chromium that opens pages from disk and says what happened, over the DevTools protocol
on two pipes (--remote-debugging-pipe); no package is needed.
"""

import base64
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
)


@dataclass
class Shown:
    """What opening a page did. requests: addresses it asked for, itself left out."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    page_width: int = 0  # of what there is to scroll, CSS pixels
    background: str = ""
    value: object = None  # of the script, if one was given
    screenshot: bytes = b""


class Browser:
    """`with Browser(folder) as browser: browser.show(file, width=390)`. folder: for its profile."""

    def __init__(self, folder: Path):
        self.folder, self._number, self._buffer, self._events = folder, 0, b"", []

    def __enter__(self):
        from_us, self._to = os.pipe()
        self._from, to_us = os.pipe()

        def take_pipes():  # Chromium reads descriptor 3 and writes descriptor 4
            a, b = os.dup(from_us), os.dup(to_us)
            os.dup2(a, 3)
            os.dup2(b, 4)

        self._process = subprocess.Popen(
            [BROWSER, *OPTIONS, f"--user-data-dir={self.folder}", "about:blank"],
            preexec_fn=take_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        return self

    def __exit__(self, *_):
        os.close(self._to)
        os.close(self._from)
        self._process.kill()
        self._process.wait()

    def show(self, file: Path, *, width=1280, dark=False, script="", screenshot=False) -> Shown:
        """Opens a file in a new tab. script: an expression whose value is returned."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def call(method, **parameters):
            return self._call(method, session, **parameters)

        for domain in ("Page", "Runtime", "Log", "Network"):
            call(f"{domain}.enable")
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        address = file.resolve().as_uri()
        call("Page.navigate", url=address)
        while not any(e["method"] == "Page.loadEventFired" for e in self._events):
            self._read()

        def value_of(expression):
            found = call("Runtime.evaluate", expression=expression, returnByValue=True)
            return found["result"].get("value")

        shown = Shown(
            page_width=value_of("document.documentElement.scrollWidth"),
            background=value_of("getComputedStyle(document.body).backgroundColor"),
            value=value_of(script) if script else None,
        )
        for event in self._events:
            self._note(event, address, shown)
        if screenshot:
            data = call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            shown.screenshot = base64.b64decode(data)
        self._call("Target.closeTarget", targetId=target)
        return shown

    def _note(self, event, address, shown):
        method, about = event["method"], event["params"]
        if method == "Network.requestWillBeSent":
            asked = about["request"]["url"]
            if asked != address and not asked.startswith("data:"):
                shown.requests.append(asked)
        elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            shown.errors.append(about["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            shown.errors.append(str(about["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning"):
            shown.errors.append(str(about["args"]))

    def _call(self, method, session=None, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self):
        """The next message; events are kept."""
        while b"\0" not in self._buffer:
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message
