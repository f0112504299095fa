"""What a namespace's bytes are, for those who see no more of a block than its name: codecs."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from kvstore.codec import ITEM_BYTES

NAMESPACES = 16_384
"""So many of tenant, scope and space are kept at hand."""

_FLOATS = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
_ITEM_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_NARROW = ("fp8", "float8", "int8", "uint8")
"""How the names of types begin whose values have one byte."""


class Space(NamedTuple):
    """The space behind a namespace. `dtype` is as torch calls it, where it is a known one."""

    space_id: bytes
    dtype: str

    @property
    def item_bytes(self) -> int:
        """How wide its values are."""
        if self.dtype.startswith(_NARROW):
            return 1
        return _ITEM_BYTES.get(self.dtype, ITEM_BYTES)


class Spaces:
    """Which space each namespace belongs to, as far as requests have named them since the start.

    One thread learns; any may ask.
    """

    def __init__(self) -> None:
        self._spaces: OrderedDict[bytes, Space] = OrderedDict()

    def learn(self, namespace: bytes, space_id: bytes, dtype: str) -> None:
        """A request names a space. The one that was named the longest ago may be forgotten."""
        if namespace not in self._spaces:
            known = dtype.lower().removeprefix("torch.")
            self._spaces[namespace] = Space(space_id, _FLOATS.get(known, known))
        self._spaces.move_to_end(namespace)
        if len(self._spaces) > NAMESPACES:
            self._spaces.popitem(last=False)

    def find(self, namespace: bytes) -> Space | None:
        """The space, if it is known."""
        return self._spaces.get(namespace)
