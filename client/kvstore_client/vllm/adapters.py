"""Names of LoRA adapters' weights, as long as it is certain which weights the engine has.

vLLM loads an adapter once and keeps it; the files may be replaced under it meanwhile. What was
computed with weights that have no certain name is neither stored nor loaded.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from kvstore_client.engine.background import InOrder
from kvstore_client.engine.weights import model_revision

_log = logging.getLogger("kvstore.vllm.adapters")


class Adapter:
    """One adapter as the engine has it, by vLLM's number."""

    def __init__(self, path: str, content: "Future[str]") -> None:
        self.path = path
        self.certain = True
        """False: its files have changed, or cannot be read."""
        self._content = content

    @property
    def content(self) -> bytes:
        """What names its weights. Only for one that was `compare`d."""
        return self._content.result().encode()

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

    def _problem(self, check: "Future[str]") -> str:
        for reading in (self._content, check):
            if reading.cancelled() or (error := reading.exception()) is not None:
                return f"its weights have no name ({error})"
        if check.result() != self._content.result():
            return "its files were replaced while the engine has it"
        return ""


class Use:
    """The use of an adapter by one request.

    The engine drops adapters that rest and reads them again, so each request may meet other files:
    they are compared before it runs and after.
    """

    def __init__(self, adapter: Adapter, before: "Future[str]", adapters: "Adapters") -> None:
        self._adapter = adapter
        self._before = before
        self._after: Future[str] | None = None
        self._adapters = adapters

    @property
    def known(self) -> bool:
        """Whether it is settled by now which weights this request will meet."""
        return self._before.done()

    @property
    def certain(self) -> bool:
        """Whether they have a name. False as long as that is not known."""
        return self.known and self._adapter.compare(self._before)

    @property
    def savable(self) -> bool:
        """Whether what was computed with them has a name."""
        after = self._after
        return self.certain and after is not None and after.done() and self._adapter.compare(after)

    @property
    def content(self) -> bytes:
        """What names the weights, if that is certain."""
        return self._adapter.content

    def ran(self) -> None:
        """A step of this request has run, so that the engine has read what it uses."""
        if self._after is None:
            self._after = self._adapters.read(self._adapter.path)

    def begins_anew(self) -> None:
        """The engine may have dropped the adapter meanwhile, and reads it again."""
        self._after = None


class Adapters:
    """Reads adapters in a thread of its own. Used by the scheduler's thread alone.

    `digest` names the weights at a path; raises ValueError or OSError if it cannot.
    """

    def __init__(self, digest: Callable[[str], str] = model_revision) -> None:
        self._digest = digest
        self._known: dict[int, Adapter] = {}
        self._reader: InOrder[str] = InOrder()

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
        return self._reader.submit(lambda: self._digest(path))

    def close(self) -> None:
        """Ends the thread, as soon as it has read what it was asked for."""
        self._reader.close()
