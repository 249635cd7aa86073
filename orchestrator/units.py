"""Quantities with their units written out: "512 MiB", "50 us", "1 Gbit/s", "100 MiB/s", "50 %".

Parsing is exact (decimal arithmetic) and strict: a number without a unit, or with a unit that means two
things ("MB", "Gbps"), is a ValueError that says what to write instead. Formatting is exact too:
`parse_x(format_x(value)) == value`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Context, Decimal

_NUMBER = r"[0-9]{1,20}(?:\.[0-9]{1,40})?"
_EXACT = Context(prec=80)
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Quantity:
    """One kind of quantity: its name, its units (largest last), and the unit people most often mean."""

    noun: str
    units: Mapping[str, Decimal]
    usual_unit: str
    example: str
    aliases: Mapping[str, str]

    def parse(self, value: object) -> Decimal:
        """Return `value` in the base unit. Raises ValueError saying what to write instead."""
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(f'{shown(value)} is not a {self.noun}; write for example "{self.example}"')
        text = str(value).strip()
        match = re.fullmatch(rf"({_NUMBER})\s*(\S.*)?", text)
        if match is None:
            raise ValueError(f'{shown(value)} is not a {self.noun}; write for example "{self.example}"')
        number, unit = match.groups()
        if unit is None:
            raise ValueError(f'{shown(value)} has no unit; write "{number} {self.usual_unit}"')
        if unit not in self.units:
            meant = self._meant(unit)
            raise ValueError(f'{shown(value)} has an unknown unit {shown(unit)}; write "{number} {meant}"')
        return _EXACT.multiply(Decimal(number), self.units[unit])

    def parse_whole(self, value: object) -> int:
        """Like parse, for quantities that are counted in whole base units (bytes, bits)."""
        amount = self.parse(value)
        if amount != amount.to_integral_value():
            base = next(iter(self.units))
            raise ValueError(f'{shown(value)} is no whole number of {base}; write "{round(amount)} {base}"')
        return int(amount)

    def format(self, amount: Decimal) -> str:
        """Write `amount` (base unit) exactly, in the largest unit that is not larger than it."""
        fitting = [unit for unit, size in self.units.items() if size <= amount]
        if amount == 0:
            return f"0 {self.usual_unit}"
        unit = fitting[-1] if fitting else next(iter(self.units))
        return f"{_plain(_EXACT.divide(amount, self.units[unit]))} {unit}"

    def format_whole(self, amount: int) -> str:
        """Write `amount` (base unit) as a whole number of the largest unit that divides it."""
        if amount == 0:
            return f"0 {self.usual_unit}"
        unit = [unit for unit, size in self.units.items() if Decimal(amount) % size == 0][-1]
        return f"{amount // int(self.units[unit])} {unit}"

    @property
    def pattern(self) -> str:
        """A regular expression for editors: what `parse` accepts."""
        units = "|".join(re.escape(unit) for unit in self.units)
        return rf"^[0-9]+(\.[0-9]+)? ?({units})$"

    def _meant(self, unit: str) -> str:
        folded = unit.casefold()
        same_but_case = {known.casefold(): known for known in self.units}.get(folded)
        return self.aliases.get(unit) or same_but_case or self.aliases.get(folded) or self.usual_unit


def shown(value: object) -> str:
    """Name a bad value in an error message, short whatever it is."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple, set)):
        return "a list"
    text = str(value)
    return f'"{text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."}"'


def _plain(number: Decimal) -> str:
    return f"{number.normalize(_EXACT):f}"


def _binary(suffix: str, base: int) -> dict[str, Decimal]:
    """Units of bytes, in multiples of 1024, each worth `base` times its bytes."""
    prefixes = ("", "Ki", "Mi", "Gi", "Ti")
    return {prefix + suffix: Decimal(base * 1024**power) for power, prefix in enumerate(prefixes)}


def _aliases(suffixes: tuple[str, ...], unit: str) -> dict[str, str]:
    """What people write for a multiple of `unit` ("m", "mb" -> "MiB"), in lower case."""
    return {letter.lower() + suffix: f"{letter}i{unit}" for letter in "KMGT" for suffix in suffixes}


_BIT_RATES = {prefix + "bit/s": Decimal(1000**power) for power, prefix in enumerate(("", "k", "M", "G"))}
_BIT_ALIASES = {
    **{f"{k.lower()}{end}": f"{k}bit/s" for k in "kMG" for end in ("", "bit", "bps", "b/s", "bits/s")},
    **{f"{k}B/s": f"{k}iB/s" for k in "KMGT"},
    "kB/s": "KiB/s",
}
_TIME_ALIASES = {
    **dict.fromkeys(("µs", "μs", "u", "usec"), "us"),
    **{"n": "ns", "nsec": "ns", "m": "ms", "msec": "ms", "sec": "s", "second": "s", "seconds": "s"},
}

SIZE = Quantity("size", _binary("B", 1), "MiB", "512 MiB", _aliases(("", "b", "i"), "B"))
DURATION = Quantity(
    "duration",
    {"ns": Decimal("1e-9"), "us": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1)},
    "us",
    "50 us",
    _TIME_ALIASES,
)
OFFSET = Quantity(
    "clock offset",
    {"ms": Decimal("1e-3"), "s": Decimal(1), "min": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)},
    "s",
    "+1 h",
    {"m": "min", "sec": "s", "seconds": "s", "hours": "h", "hour": "h", "day": "d", "days": "d"},
)
BANDWIDTH = Quantity("bandwidth", _BIT_RATES | _binary("B/s", 8), "Mbit/s", "1 Gbit/s", _BIT_ALIASES)
_BYTE_ALIASES = _aliases(("", "b", "b/s", "bps"), "B/s")
BYTE_RATE = Quantity("bandwidth", _binary("B/s", 1), "MiB/s", "100 MiB/s", _BYTE_ALIASES)
PERCENT = Quantity("percentage", {"%": Decimal("0.01")}, "%", "50 %", {})


def parse_size(value: object) -> int:
    """Bytes of a size such as "512 MiB"."""
    return SIZE.parse_whole(value)


def parse_duration(value: object) -> float:
    """Seconds of a duration such as "50 us"."""
    return float(DURATION.parse(value))


def parse_offset(value: object) -> float:
    """Seconds of a duration with a sign, such as "+1 h" or "-30 s"; without one it is ahead."""
    text = str(value).strip()
    amount = float(OFFSET.parse(text.lstrip("+-").strip() if text[:1] in ("+", "-") else value))
    return -amount if text.startswith("-") else amount


def parse_bandwidth(value: object) -> int:
    """Bits per second of a bandwidth such as "1 Gbit/s" or "100 MiB/s"."""
    return BANDWIDTH.parse_whole(value)


def parse_byte_rate(value: object) -> int:
    """Bytes per second of a disk's bandwidth such as "100 MiB/s"."""
    return BYTE_RATE.parse_whole(value)


def parse_percent(value: object) -> float:
    """Fraction (1.0 is all of it) of a percentage such as "50 %"."""
    return float(PERCENT.parse(value))


def format_size(size_bytes: int) -> str:
    """Write a number of bytes: 536870912 -> "512 MiB". Exact: "1537 MiB", never "1.5 GiB" for it."""
    return SIZE.format_whole(size_bytes)


def format_duration(seconds: float) -> str:
    """Write a number of seconds: 5e-05 -> "50 us"."""
    return DURATION.format(Decimal(repr(float(seconds))))


def format_offset(seconds: float) -> str:
    """Write a number of seconds with its sign, in the largest unit that divides it: -5400.0 -> "-90 min"."""
    amount = Decimal(repr(abs(float(seconds))))
    unit = ([unit for unit, size in OFFSET.units.items() if amount % size == 0] or ["s"])[-1]
    return f"{'-' if seconds < 0 else '+'}{_plain(_EXACT.divide(amount, OFFSET.units[unit]))} {unit}"


def format_bandwidth(bits_per_second: int) -> str:
    """Write a number of bits per second in decimal bit units: 1000000000 -> "1 Gbit/s"."""
    bits = Quantity("bandwidth", _BIT_RATES, BANDWIDTH.usual_unit, BANDWIDTH.example, {})
    return bits.format(Decimal(bits_per_second))


def format_byte_rate(bytes_per_second: int) -> str:
    """Write a number of bytes per second: 104857600 -> "100 MiB/s"."""
    return BYTE_RATE.format_whole(bytes_per_second)


def format_percent(fraction: float) -> str:
    """Write a fraction as a percentage: 0.5 -> "50 %"."""
    return PERCENT.format(Decimal(repr(float(fraction))))
