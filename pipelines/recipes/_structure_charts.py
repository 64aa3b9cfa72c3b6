"""What the page on structure tokens is made of: one HTML file that needs nothing else, with charts as SVG inside.

Names of tasks, pairs and files are text, never markup: they go through `html.escape`.
"""

from collections.abc import Mapping, Sequence
from html import escape

from pipelines.recipes._concept_page import COLOURS, STYLE, table

METHODS = {
    "codes": "codes",
    "latents": "latents (no quantizer)",
    "dihedrals": "k-means of dihedrals",
    "control": "constant",
}
CHARTS = """
svg { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; max-width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .soft { fill: var(--soft); }
svg line { stroke: var(--line); } figure { margin: .4rem 0 1.4rem; }
figcaption { color: var(--soft); font-size: .85rem; }
section { margin-bottom: 2rem; } section > p { color: var(--soft); max-width: 80ch; margin: .3rem 0; }
h2 { margin-top: 1.2rem; }
"""
WIDTH, HEIGHT, EDGE = 560, 240, 44


def page(title: str, about: str, facts: Mapping[str, str], sections: Sequence[str]) -> str:
    """The whole page.

    Args:
        facts: name -> value, shown large on top.
        sections: from `section`.
    """
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>
<style>{STYLE}{CHARTS}</style></head><body>
<header><h1>{escape(title)}</h1><p class="about">{escape(about)}</p><dl>{shown}</dl></header>
<main>{"".join(sections)}</main></body></html>
"""


def section(title: str, text: str, *parts: str) -> str:
    """One part of the page: plain text, then charts and tables."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{''.join(parts)}</section>"


def shown(value: float | None, digits: int = 3) -> str:
    """A number for a table."""
    return "–" if value is None else f"{value:,.{digits}f}"


def bars(groups: Sequence[tuple[str, Mapping[str, float | None]]], caption: str) -> str:
    """A group of horizontal bars each: name -> method -> score, from 0 (or the lowest score) to 1."""
    methods = [name for name in METHODS if any(name in scores for _, scores in groups)]
    low = min([0.0, *(value for _, scores in groups for value in scores.values() if value is not None)])
    step, left = 14, 190
    height = sum(len(methods) * step + 12 for _ in groups) + 34
    span = WIDTH - left - 60

    def across(value: float) -> float:
        return left + span * (value - low) / (1 - low)

    drawn, y = [], 26.0
    for place, name in enumerate(methods):
        drawn.append(_box(left + 140 * place - 150, 6, 9, 9, COLOURS[place]))
        drawn.append(_text(left + 140 * place - 137, 14, METHODS[name].partition(" (")[0], "soft"))
    for name, scores in groups:
        drawn.append(_text(8, y + 6 + len(methods) * step / 2, name[:30]))
        for place, method in enumerate(methods):
            value = scores.get(method)
            if value is not None:
                begin, end = sorted((across(0.0), across(value)))
                drawn.append(_box(begin, y, max(1.0, end - begin), step - 3, COLOURS[place]))
                drawn.append(_text(end + 5, y + 10, f"{value:.3f}", "soft"))
            y += step
        y += 12
    return _figure(drawn, caption, height)


def histogram(series: Mapping[str, Sequence[float]], ends: tuple[float, float], caption: str) -> str:
    """Shares of equal bins between two ends, one line a series."""
    most = max(max(values) for values in series.values()) or 1.0
    drawn = _axes(ends, (0.0, most))
    for place, (name, values) in enumerate(series.items()):
        points = [(_across((n + 0.5) / len(values)), _down(value / most)) for n, value in enumerate(values)]
        drawn += [_line(points, COLOURS[place]), _key(place, name)]
    return _figure(drawn, caption)


def curve(values: Sequence[float], caption: str) -> str:
    """Numbers from the largest to the smallest."""
    most = max([*values, 1e-12])
    points = [(_across(n / max(1, len(values) - 1)), _down(value / most)) for n, value in enumerate(values)]
    return _figure([*_axes((0.0, 1.0), (0.0, most)), _line(points, COLOURS[0])], caption)


def scatter(points: Sequence[tuple[float, float, str]], caption: str) -> str:
    """(x, y, name) dots, each named by its title."""
    sides = _ends([x for x, _, _ in points]), _ends([y for _, y, _ in points])
    (low, high), (bottom, top) = sides
    dots = [
        f'<circle cx="{_across((x - low) / (high - low)):.1f}" cy="{_down((y - bottom) / (top - bottom)):.1f}" r="4"'
        f' fill="{COLOURS[0]}" fill-opacity=".65"><title>{escape(name)}: {x:.3f}, {y:.3f}</title></circle>'
        for x, y, name in points
    ]
    return _figure([*_axes(*sides), *dots], caption)


def beside(names: Sequence[str], metrics: Sequence[Mapping[str, float]]) -> str:
    """One line a metric, one column a report."""
    keys = list(dict.fromkeys(key for one in metrics for key in one))
    rows = [[key, *(shown(one.get(key)) for one in metrics)] for key in keys]
    return table("All numbers", ["", *names], rows)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _across(share: float) -> float:
    return EDGE + share * (WIDTH - 2 * EDGE)


def _down(share: float) -> float:
    return HEIGHT - EDGE + share * (2 * EDGE - HEIGHT)


def _axes(x: tuple[float, float], y: tuple[float, float]) -> list[str]:
    left, right, bottom, top = _across(0), _across(1), _down(0), _down(1)
    return [
        f'<line x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>',
        f'<line x1="{left}" y1="{bottom}" x2="{left}" y2="{top}"/>',
        _text(left - 4, bottom + 16, f"{x[0]:.3g}", "soft"), _text(right - 14, bottom + 16, f"{x[1]:.3g}", "soft"),
        _text(4, bottom, f"{y[0]:.2g}", "soft"), _text(4, top + 8, f"{y[1]:.2g}", "soft"),
    ]  # fmt: skip


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _key(place: int, name: str) -> str:
    x = EDGE + 130 * place
    return _box(x, 8, 9, 9, COLOURS[place]) + _text(x + 14, 17, name, "soft")


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _figure(drawn: Sequence[str], caption: str, height: float = HEIGHT) -> str:
    label = escape(caption, quote=True)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img" aria-label="{label}">'
        f"{''.join(drawn)}</svg><figcaption>{label}</figcaption></figure>"
    )
