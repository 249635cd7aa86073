"""Quantities with units: exact both ways, and errors that say what to write."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator import units


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.parse_size, "512 MiB", 512 * 1024**2),
        (units.parse_size, "16MiB", 16 * 1024**2),
        (units.parse_size, "1.5 KiB", 1536),
        (units.parse_size, "0 B", 0),
        (units.parse_duration, "50 us", 5e-05),
        (units.parse_duration, "1.5 ms", 0.0015),
        (units.parse_bandwidth, "1 Gbit/s", 1_000_000_000),
        (units.parse_bandwidth, "100 MiB/s", 100 * 1024**2 * 8),
        (units.parse_byte_rate, "100 MiB/s", 100 * 1024**2),
        (units.parse_percent, "50 %", 0.5),
        (units.parse_percent, "0.1%", 0.001),
    ],
)
def test_parse(parse: Callable[[object], float], text: str, value: float) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "given_value", "message"),
    [
        (units.parse_size, "512", '"512" has no unit; write "512 MiB"'),
        (units.parse_size, 512, '"512" has no unit; write "512 MiB"'),
        (units.parse_size, "512 MB", '"512 MB" has an unknown unit "MB"; write "512 MiB"'),
        (units.parse_size, "2g", '"2g" has an unknown unit "g"; write "2 GiB"'),
        (units.parse_size, "2 gib", '"2 gib" has an unknown unit "gib"; write "2 GiB"'),
        (units.parse_size, "-1 MiB", '"-1 MiB" is not a size; write for example "512 MiB"'),
        (units.parse_size, "0.3 B", '"0.3 B" is no whole number of B; write "0 B"'),
        (units.parse_size, "٣ MiB", '"٣ MiB" is not a size; write for example "512 MiB"'),
        (units.parse_size, None, 'nothing is not a size; write for example "512 MiB"'),
        (units.parse_size, True, '"True" is not a size; write for example "512 MiB"'),
        (units.parse_size, {}, 'a mapping is not a size; write for example "512 MiB"'),
        (units.parse_duration, "50 µs", '"50 µs" has an unknown unit "µs"; write "50 us"'),
        (units.parse_bandwidth, "1 Gbps", '"1 Gbps" has an unknown unit "Gbps"; write "1 Gbit/s"'),
        (units.parse_bandwidth, "10 Mb/s", '"10 Mb/s" has an unknown unit "Mb/s"; write "10 Mbit/s"'),
        (units.parse_bandwidth, "10 MB/s", '"10 MB/s" has an unknown unit "MB/s"; write "10 MiB/s"'),
        (units.parse_byte_rate, "1 Gbit/s", '"1 Gbit/s" has an unknown unit "Gbit/s"; write "1 MiB/s"'),
        (units.parse_percent, "0.5", '"0.5" has no unit; write "0.5 %"'),
    ],
)
def test_refuse(parse: Callable[[object], float], given_value: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(given_value)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.format_size(1536 * 1024**2), "1536 MiB"),
        (units.format_size(1000), "1000 B"),
        (units.format_size(0), "0 MiB"),
        (units.format_duration(0.00125), "1.25 ms"),
        (units.format_duration(90.0), "90 s"),
        (units.format_offset(90.0), "+90 s"),
        (units.format_offset(-5400.0), "-90 min"),
        (units.format_offset(86400.0), "+1 d"),
        (units.format_bandwidth(2_500_000_000), "2.5 Gbit/s"),
        (units.format_percent(0.001), "0.1 %"),
        (units.format_percent(1.0), "100 %"),
    ],
)
def test_format(text: str, expected: str) -> None:
    assert text == expected


@given(st.integers(0, 2**60))
@example(2**60 + 1)
def test_sizes_round_trip(size: int) -> None:
    assert units.parse_size(units.format_size(size)) == size
    assert units.parse_byte_rate(units.format_byte_rate(size)) == size
    assert re.search(units.SIZE.pattern, units.format_size(size))


@given(st.integers(0, 10**15))
def test_bandwidths_round_trip(rate: int) -> None:
    assert units.parse_bandwidth(units.format_bandwidth(rate)) == rate


@given(st.floats(1e-6, 1e8) | st.floats(-1e8, -1e-6))
def test_offsets_round_trip(number: float) -> None:
    assert units.parse_offset(units.format_offset(number)) == number


@given(st.floats(1e-12, 1e6) | st.just(0.0))
def test_durations_and_fractions_round_trip(number: float) -> None:
    assert units.parse_duration(units.format_duration(number)) == number
    assert units.parse_percent(units.format_percent(number)) == number


@given(st.text() | st.integers() | st.floats() | st.none() | st.lists(st.integers()))
def test_anything_else_is_a_value_error(value: object) -> None:
    for parse in (units.parse_size, units.parse_duration, units.parse_bandwidth, units.parse_percent):
        with contextlib.suppress(ValueError):
            assert parse(value) >= 0


@given(
    st.sampled_from([units.SIZE, units.DURATION, units.BANDWIDTH, units.BYTE_RATE, units.PERCENT, units.OFFSET]),
    st.data(),
)
def test_every_suggestion_is_accepted(quantity: units.Quantity, data: st.DataObject) -> None:
    """Following the advice for a wrong unit never leads to the same error again."""
    unit = data.draw(
        st.sampled_from([*quantity.units, *quantity.aliases]).map(str.swapcase) | st.text(max_size=5)
    )
    text = f"7 {unit}"
    try:
        quantity.parse(text)
    except ValueError as error:
        advice = str(error).rsplit('write "', 1)
        if len(advice) == 2:
            quantity.parse(advice[1].removesuffix('"'))
