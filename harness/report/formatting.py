"""How numbers look in tables: one rule for each kind, the same in every output format."""

from __future__ import annotations

from math import isfinite

ABSENT = "-"


def number(value: float | None) -> str:
    """A measured or claimed value: 20.11, 1234, 1.23e5, or "-"."""
    return ABSENT if value is None else _fixed(value, abs(value))


def with_error(value: float, stderr: float | None) -> tuple[str, str]:
    """A value and its standard error as (value, "± error") with equal decimals: ("20.11", "± 0.84")."""
    if stderr is None or not isfinite(stderr):
        return number(value), ""
    return number(value), f"± {_fixed(stderr, abs(value))}"


def signed(value: float | None) -> str:
    """A difference with its sign: +5.49, -0.32, or "-"."""
    if value is None:
        return ABSENT
    text = number(abs(value))
    return text if float(text) == 0 else f"{'+' if value > 0 else '-'}{text}"


def bits(value: float | None) -> str:
    """Bits per weight with the three decimals that a scale of 0.004 needs."""
    return ABSENT if value is None else f"{value:.3f}"


def megabytes(size: int | None) -> str:
    """Bytes as decimal megabytes (1e6 bytes) with one decimal."""
    return ABSENT if size is None else f"{size / 1e6:.1f}"


def _fixed(value: float, scale: float) -> str:
    """`value` with the decimals that suit a number of size `scale`."""
    if not isfinite(value):
        return str(value)
    if scale < 999.995:
        return f"{value:.2f}"
    if scale < 99999.5:
        return f"{value:.0f}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
