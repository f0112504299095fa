"""Names of LoRA adapters' weights, as long as it is certain which weights the engine has.

vLLM loads an adapter once and keeps it; the files may be replaced under it meanwhile. What was
computed with weights that have no certain name is neither stored nor loaded.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kvstore_client.engine.weights import model_revision

_log = logging.getLogger("kvstore.vllm.adapters")


class Adapter:
    """One adapter as the engine has it, by vLLM's number. Used by the scheduler's thread alone."""

    def __init__(self, path: str, content: "Future[str]") -> None:
        self.path = path
        self.certain = True
        """False: its files have changed, or cannot be read."""
        self._content = content
        self._after: Future[str] | None = None
        """Read after a step with it had run, so that the engine has read the files before."""

    @property
    def content(self) -> bytes:
        """What names its weights. Only for one that was `compare`d."""
        return self._content.result().encode()

    @property
    def confirmed(self) -> bool:
        """Whether the files were the same before the engine read them and after."""
        return self._after is not None and self._after.done() and self.compare(self._after)

    def compare(self, check: "Future[str]") -> bool:
        """Whether a later reading, which has ended, found what the first one found."""
        if self.certain and (problem := self._problem(check)):
            self.certain = False
            _log.warning(
                "adapter at %s: %s; what is computed with it is neither stored nor loaded",
                self.path,
                problem,
            )
        return self.certain

    def ran(self, read: "Callable[[str], Future[str]]") -> None:
        """A step with it has run: from here on the engine has what it read."""
        if self._after is None:
            self._after = read(self.path)

    def _problem(self, check: "Future[str]") -> str:
        for reading in (self._content, check):
            if reading.cancelled() or (error := reading.exception()) is not None:
                return f"its weights have no name ({error})"
        if check.result() != self._content.result():
            return "its files were replaced while the engine has it"
        return ""


class Use:
    """The use of an adapter by one request."""

    def __init__(self, adapter: Adapter, check: "Future[str]", adapters: "Adapters") -> None:
        self._adapter = adapter
        self._check = check
        self._adapters = adapters

    @property
    def known(self) -> bool:
        """Whether it is settled by now which weights this request will meet."""
        return self._check.done()

    @property
    def certain(self) -> bool:
        """Whether they have a name. False as long as that is not known."""
        return self.known and self._adapter.compare(self._check)

    @property
    def savable(self) -> bool:
        """Whether what was computed with them has a name."""
        return self.certain and self._adapter.confirmed

    @property
    def content(self) -> bytes:
        """What names the weights, if that is certain."""
        return self._adapter.content

    def ran(self) -> None:
        """A step of this request has run."""
        self._adapter.ran(self._adapters.read)


class Adapters:
    """Reads adapters in a thread of its own. Used by the scheduler's thread alone.

    `digest` names the weights at a path; raises ValueError or OSError if it cannot.
    """

    def __init__(self, digest: Callable[[str], str] = model_revision) -> None:
        self._digest = digest
        self._known: dict[int, Adapter] = {}
        self._reader = ThreadPoolExecutor(1, "kvstore-adapters")

    def use(self, lora: Any) -> Use:
        """A new request uses this adapter."""
        check = self.read(lora.lora_path)
        adapter = self._known.get(lora.lora_int_id)
        if adapter is None or lora.load_inplace or adapter.path != lora.lora_path:
            if adapter is not None:
                # Requests that run still name the weights that were there before.
                adapter.certain = False
            adapter = self._known[lora.lora_int_id] = Adapter(lora.lora_path, check)
        return Use(adapter, check, self)

    def read(self, path: str) -> "Future[str]":
        """Begins to read what lies there now."""
        return self._reader.submit(self._digest, path)

    def close(self) -> None:
        """Ends the thread."""
        self._reader.shutdown(wait=False, cancel_futures=True)
