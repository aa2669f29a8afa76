"""A headless Chromium that tests drive through its debugging port."""

import asyncio
import base64
import io
import itertools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--remote-debugging-port=0",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
)
WITH_WEBGL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")
WITHOUT_WEBGL = ("--disable-3d-apis",)
TIMEOUT_SECONDS = 300


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, *flags: str, width: int = 1280, height: int = 800) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        assert CHROMIUM is not None
        options = [*FLAGS, *flags, f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            [CHROMIUM, *options, f"--window-size={width},{height}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self.messages: list[str] = []
        """What the page logged, and the errors that no one caught."""
        self._loop.run_until_complete(self._connect())
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    async def _connect(self) -> None:
        port_file = Path(self._profile.name) / "DevToolsActivePort"
        for _ in range(TIMEOUT_SECONDS * 20):
            if port_file.exists() and "\n" in port_file.read_text():
                break
            await asyncio.sleep(0.05)
        port = port_file.read_text().split("\n")[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as answer:
            targets = await answer.json(content_type=None)
        address = next(tab["webSocketDebuggerUrl"] for tab in targets if tab["type"] == "page")
        self._socket = await self._session.ws_connect(address, max_msg_size=0)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol; return its result."""
        return self._loop.run_until_complete(self._send(method, parameters))

    async def _send(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=TIMEOUT_SECONDS)
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message["method"] == "Runtime.exceptionThrown":
            self.messages.append(str(parameters["exceptionDetails"]))
        elif message["method"] == "Log.entryAdded":
            self.messages.append(parameters["entry"]["text"])
        elif message["method"] == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith(("file:", "data:", "about:", "blob:")):
                self.messages.append(f"request of {url}")

    def run(self, script: str) -> Any:
        """Value of an expression in the page; a promise is awaited."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open_page(self, path: Path) -> int:
        """Open a case page and wait until it is drawn; milliseconds that this took."""
        self.messages.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        wait = """new Promise((done) => {
            const look = () => {
                const opened = document.documentElement?.dataset.openedMs;
                opened && document.readyState === "complete"
                    ? done(Number(opened)) : setTimeout(look, 20);
            };
            look();
        })"""
        return int(self.run(wait))

    def next_frame(self) -> None:
        """Wait until what was asked for is painted."""
        self.run("new Promise((d) => requestAnimationFrame(() => requestAnimationFrame(d)))")

    def mouse(self, kind: str, x: float, y: float, button: str = "none", **more: Any) -> None:
        """Move, press, release or turn (`mouseWheel`) the mouse at a place of the window."""
        self.send(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1, **more
        )

    def drag(self, start: tuple[float, float], end: tuple[float, float], button: str) -> None:
        """Drag the mouse from a place of the window to another."""
        held = {"left": 1, "right": 2, "middle": 4}[button]
        self.mouse("mousePressed", *start, button, buttons=held)
        self.mouse("mouseMoved", *end, button, buttons=held)
        self.mouse("mouseReleased", *end, button)
        self.next_frame()

    def key(self, key: str) -> None:
        """Press and release a key."""
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.next_frame()

    def screenshot(self) -> NDArray[np.uint8]:
        """Picture of the window, (Y, X, 3)."""
        self.next_frame()
        png = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

    def close(self) -> None:
        """End the browser."""
        self._loop.run_until_complete(self._socket.close())
        self._loop.run_until_complete(self._session.close())
        self._process.terminate()
        self._process.wait()
        self._loop.close()
        self._profile.cleanup()
