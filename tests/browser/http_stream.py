"""A client's stream, read on a thread while the test drives the browser."""

import json
import threading
from typing import Any

import httpx


class HttpStream:
    """A streamed completion; ``text`` grows while it runs."""

    def __init__(self, base_url: str, api_key: str, prompt: str, **fields: Any) -> None:
        self._request: dict[str, Any] = {
            "url": f"{base_url}/completions",
            "headers": {"Authorization": f"Bearer {api_key}"},
            "json": {"model": "scripted", "stream": True, "prompt": prompt, **fields},
        }
        self.text = ""
        self.error: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="http-stream", daemon=True)
        self._thread.start()

    @property
    def finished(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(60)

    def _run(self) -> None:
        with httpx.stream("POST", **self._request, timeout=120) as response:
            for line in response.iter_lines():
                if self._stop.is_set():
                    return
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.error = event["error"]["message"]
                    return
                self.text += event["choices"][0]["text"]
