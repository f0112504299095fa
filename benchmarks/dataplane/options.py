"""What an option of the benchmark may say: names, numbers and sizes, some with commas between."""

import math
from typing import Any

import click

from benchmarks.dataplane.plan import ALL_PATHS

_UNITS = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "b": 1}


class Names(click.ParamType[tuple[str, ...]]):
    """Some of the paths, with commas between them."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The names in the order of `ALL_PATHS`, each once."""
        if isinstance(value, tuple):
            return value
        names = {part.strip() for part in value.split(",")}
        unknown = names - set(ALL_PATHS)
        if unknown:
            self.fail(f"{sorted(unknown)[0]!r} is not one of {', '.join(ALL_PATHS)}", param, ctx)
        return tuple(name for name in ALL_PATHS if name in names)


class Amounts(click.ParamType[tuple[int, ...]]):
    """Numbers with commas between them, each of them within its range; sizes may have a unit."""

    name = "amounts"

    def __init__(self, least: int, most: int, multiple: int = 1) -> None:
        self._least = least
        self._most = most
        self._multiple = multiple

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers in ascending order, each once."""
        if isinstance(value, tuple):
            return value
        amounts = set()
        for part in str(value).split(","):
            amount = _amount(part)
            if amount is None or not self._least <= amount <= self._most or amount % self._multiple:
                of = f", a multiple of {self._multiple}" if self._multiple > 1 else ""
                self.fail(f"{part!r}: {self._least:,} … {self._most:,} is needed{of}", param, ctx)
            amounts.add(amount)
        return tuple(sorted(amounts))


def _amount(text: str) -> int | None:
    """A number, or a number of bytes such as 2MiB; None: neither."""
    text = text.strip().lower()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(digits) :].strip()
    if not digits.isdigit() or (unit and unit not in _UNITS):
        return None
    return int(digits) * _UNITS.get(unit, 1)


class Seconds(click.FloatRange):
    """A time within a range; not a number is outside of every range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number itself."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{seconds} is not in the range {self._describe_range()}.", param, ctx)
        return seconds
