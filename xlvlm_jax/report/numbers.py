"""Numbers as text."""


def number(value: float) -> str:
    """Formats a number: three significant digits, or all of an integer; thousands separated."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{float(f'{value:.3g}'):g}"


def percent(share: float) -> str:
    """Formats a share as a percentage, with two digits below 10 %; only zero is shown as 0."""
    text = f"{100 * share:.0f}" if not 0 < share < 0.095 else f"{100 * share:.2g}"
    text = "<0.01" if 0 < share < 1e-4 else text
    return f"{text}\N{NARROW NO-BREAK SPACE}%"
