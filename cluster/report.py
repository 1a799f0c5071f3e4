"""A run's status as one HTML page that needs nothing else: numbers, where its time went, its starts, its curves."""

import math
import time
from html import escape
from typing import Any

from cluster.goodput import Status, duration, summary
from launcher.goodput import PARTS

COLORS = {"steps": "#1b7f4b", "data": "#8cc9a6", "checkpoint": "#2f6db5", "evaluation": "#9cc3e8", "lost": "#c0392b",
          "start-up": "#e0a030", "queue": "#b9b9b9", "rest": "#6b6b6b"}  # fmt: skip
CURVES = {"loss/train": "training loss, nats", "loss/valid": "held-out loss, nats", "speed/tokens_per_s": "tokens/s"}
WIDTH, HEIGHT, LEFT, BOTTOM = 860, 240, 70, 28  # of a plot, pixels; the last two: room for the numbers of its axes
POINTS = 1000  # of a curve at most; of more, every so manyth is drawn, and the last

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{run}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 900px; margin: 2em auto; padding: 0 1em }}
h1 {{ font-size: 1.4em }} h2 {{ font-size: 1.1em; margin-top: 2em }}
td, th {{ padding: .2em 1em .2em 0; text-align: left; vertical-align: top }} td.n {{ text-align: right }}
.key {{ display: inline-block; width: .8em; height: .8em }} svg {{ max-width: 100% }} text {{ font-size: 12px; fill: #555 }}
</style></head><body>
<h1>{run}: {state}</h1>
<p>{summary}</p>
{slow}<h2>Where the time went</h2>
{time}
<h2>Starts</h2>
<table><tr><th>begun</th><th>job</th><th>nodes</th><th>from step</th><th>end</th></tr>
{starts}</table>
{curves}
<p>As of {when}.</p>
</body></html>
"""


def html_page(status: Status, metrics: list[dict[str, Any]], now: float) -> str:
    """metrics: lines of metrics.jsonl.    now: seconds since 1970."""
    curves = ""
    for name, title in CURVES.items():
        points = [(line["step"], line[name]) for line in metrics if isinstance(line.get(name), int | float)]
        if len(points) > 1:
            curves += f"<h2>{title}</h2>\n{_plot(points)}\n"
    return PAGE.format(
        run=escape(status.run),
        state=escape(status.state),
        summary=escape(summary(status)).replace("  ", " · "),
        slow="".join(f"<p>Slow {escape(text)}.</p>\n" for text in status.slow),
        time=_bar(status),
        starts="".join(
            f"<tr><td>{_when(s.time)}</td><td>{escape(s.job)}{f'.{s.restart}' if s.job else ''}</td><td>{escape(s.nodes)}"
            f"</td><td class=n>{s.from_step:,}</td><td>{escape(s.end or 'running')}</td></tr>\n"
            for s in status.starts
        ),
        curves=curves,
        when=_when(now),
    )


def _bar(status: Status) -> str:
    if status.goodput is None:
        return "<p>Nothing has been done yet.</p>"
    x, rects, rows = 0.0, "", ""
    for key, title in PARTS.items():
        share = status.parts_s[key] / status.wall_s
        rects += f'<rect x="{x * WIDTH:.2f}" width="{share * WIDTH:.2f}" height="28" fill="{COLORS[key]}"/>'
        rows += (
            f'<tr><td><span class=key style="background:{COLORS[key]}"></span> {title}</td>'
            f"<td class=n>{share:.1%}</td><td class=n>{duration(status.parts_s[key])}</td></tr>\n"
        )
        x += share
    return (
        f"<p>Goodput {status.goodput:.1%} of {duration(status.wall_s)}.</p>\n"
        f'<svg viewBox="0 0 {WIDTH} 28" width="{WIDTH}">{rects}</svg>\n<table>\n{rows}</table>'
    )


def _plot(points: list[tuple[int, float]]) -> str:
    """A curve over the steps, as SVG. points: two at least."""
    stride = math.ceil(len(points) / POINTS)
    points = points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])
    xs, ys = ticks(points[0][0], points[-1][0]), ticks(min(y for _, y in points), max(y for _, y in points))
    low_x, high_x = min(xs[0], points[0][0]), max(xs[-1], points[-1][0])
    low_y, high_y = ys[0], ys[-1]

    def across(x: float) -> float:
        return LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - 10)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - BOTTOM - 10)

    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{up(y):.1f}" y2="{up(y):.1f}" stroke="#ddd"/>'
        f'<text x="{LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{y:,.10g}</text>'
        for y in ys
    ) + "".join(f'<text x="{across(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x:,.10g}</text>' for x in xs)
    line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">{grid}'
        f'<polyline points="{line}" fill="none" stroke="#2f6db5" stroke-width="1.5"/></svg>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that take in both."""
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span))
    step = next(power * m for m in (0.1, 0.2, 0.5, 1, 2) if span / (power * m) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
