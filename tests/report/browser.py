"""A headless Chromium, spoken to over a pipe in its own protocol, so that no package is needed."""

import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")
_SECONDS = 120
_CODES = {"Tab": 9, "Enter": 13}  # without them a key event moves no focus and sends no form


def axe() -> str | None:
    """Return axe-core's script, where a package that brings it is installed."""
    found = importlib.util.find_spec("axe_playwright_python")
    folder = found and found.submodule_search_locations and Path(found.submodule_search_locations[0])
    return (folder / "axe.min.js").read_text(encoding="utf-8") if folder else None


class Tab:
    """One page: ``tab(method, **parameters)`` calls the browser, ``tab.events`` is what it told meanwhile."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900) -> None:
        (to_read, self._to), (self._from, to_write) = os.pipe(), os.pipe()
        given = [fcntl.fcntl(end, fcntl.F_DUPFD, 50) for end in (to_read, to_write)]
        command = [str(BROWSER), *QUIET, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
        line = f"exec {shlex.join(command)} 3<&{given[0]} 4>&{given[1]}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(["bash", "-c", line], pass_fds=given, **quiet)
        for end in (to_read, to_write, *given):
            os.close(end)
        self.events: list[dict] = []
        self._number, self._buffer, self._session = 0, b"", None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Performance"):
            self(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> "Tab":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def __call__(self, method: str, **parameters: object) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def resize(self, width: int, height: int) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def media(self, kind: str = "screen", scheme: str = "light") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self("Emulation.setEmulatedMedia", media=kind, features=features)

    def open(self, page: Path | str, sign: str = "measured") -> None:
        """Go to a file or an address, and wait until the page's root has the class that says it is drawn."""
        self.events.clear()
        self("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        self.wait("document.readyState === 'complete'")
        self.wait(f"document.documentElement.classList.contains('{sign}')")

    def run(self, script: str) -> object:
        """Return the value of a script, as typed into the console."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + _SECONDS
        while not self.run(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.02)

    def type(self, text: str) -> None:
        for letter in text:
            self("Input.dispatchKeyEvent", type="char", text=letter)

    def press(self, key: str) -> None:
        code = {"windowsVirtualKeyCode": _CODES[key]} if key in _CODES else {}
        text = {"text": "\r"} if key == "Enter" else {}
        self("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", key=key, code=key, **code, **text)
        self("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, **code)

    def violations(self) -> list[list[str]]:
        """Return what axe finds wrong with the page."""
        self.run(f"{axe()}; 0")
        told = "(v) => [v.id, v.nodes[0].html, v.nodes[0].failureSummary]"
        return self.run(f"axe.run().then((r) => r.violations.map({told}))")

    def told(self, method: str) -> list[dict]:
        """Return the parameters of the events of one kind."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def measured(self, name: str) -> float:
        values = self("Performance.getMetrics")["metrics"]
        return next(value["value"] for value in values if value["name"] == name)

    def _next(self) -> dict:
        while b"\0" not in self._buffer:
            piece = os.read(self._from, 1 << 20)
            assert piece, "the browser is gone"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
