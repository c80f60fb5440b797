"""A real browser for tests: headless Chromium without a network but this machine's, driven by its DevTools protocol."""

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest

START_S, WAIT_S = 60, 60
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--remote-debugging-port=0", "--window-size=1400,1200", "--hide-scrollbars",
    # a name of anywhere else leads nowhere
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)  # fmt: skip
Result = TypeVar("Result")


class Browser:
    """One page of a running browser."""

    def __init__(self, loop: asyncio.AbstractEventLoop, page: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._page, self._number = loop, page, 0
        self.requests: list[str] = []
        """URLs that the page asked for, but data: URIs."""
        self.complaints: list[str] = []
        """What the browser wrote to the console: errors of scripts, and what a policy forbade."""
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        return self._run(self._call(method, parameters))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._page.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            said = json.loads(await asyncio.wait_for(self._page.receive_str(), WAIT_S))
            if said.get("id") == self._number:
                assert "error" not in said, said
                return dict(said["result"])
            self._note(said)

    def _note(self, event: dict[str, Any]) -> None:
        if event["method"] == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            if not url.startswith("data:"):
                self.requests.append(url)
        elif event["method"] == "Log.entryAdded":
            self.complaints.append(event["params"]["entry"]["text"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(event["params"]["exceptionDetails"]))

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._loop.run_until_complete(work)

    def open(self, url: str) -> None:
        """Load a page to its end."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href !== 'about:blank' && document.readyState === 'complete' /* {time.monotonic()} */")

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression in the page is true."""
        end = time.monotonic() + WAIT_S
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"waited in vain for {condition}: {self.text()[:500]}"
            time.sleep(0.05)

    def text(self) -> str:
        """What the page shows."""
        return str(self.evaluate("document.body.innerText"))

    def type_into(self, selector: str, text: str) -> None:
        """Type into a field, which is empty before."""
        self.evaluate(f"(e => {{ e.value = ''; e.focus() }})(document.querySelector({selector!r}))")
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """A click into the middle of an element."""
        place = self.evaluate(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file for an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def drop_file(self, selector: str, path: Path) -> None:
        """Drag a file from outside onto an element."""
        place = self.evaluate(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=place[0], y=place[1], data=data)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        import base64

        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 4000), "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A browser with an empty profile; skips where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser: install chromium")
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        loop = asyncio.new_event_loop()
        session = loop.run_until_complete(_session())
        try:
            yield Browser(loop, loop.run_until_complete(_page(session, Path(profile), process)))
        finally:
            loop.run_until_complete(session.close())
            loop.close()
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


async def _page(
    session: aiohttp.ClientSession, profile: Path, process: subprocess.Popen[bytes]
) -> aiohttp.ClientWebSocketResponse:
    """The connection to the browser's first page."""
    end, port_file = time.monotonic() + START_S, profile / "DevToolsActivePort"
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError, IndexError, aiohttp.ClientError, StopIteration):
            port = port_file.read_text().splitlines()[0]
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [each for each in await answer.json() if each["type"] == "page"]
            return await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
        await asyncio.sleep(0.1)
    raise RuntimeError("the browser did not start")
