"""A plan as one HTML file that needs nothing else: a picture of memory over the phases of a step, and the numbers."""

from collections.abc import Mapping
from html import escape
from typing import Any

COLOURS = {
    "weights": "#4c78a8", "adapter": "#9ecae9", "gradients": "#e45756", "optimizer": "#f58518",
    "activations": "#54a24b", "reference": "#b279a2", "critic": "#d67195", "teacher": "#9d755d",
    "reward models": "#bab0ac", "reserve": "#79706e",
}  # fmt: skip
FURTHER = ("#72b7b2", "#eeca3b", "#ff9da6", "#88d27a", "#439894", "#b79a20")
WIDTH, HEIGHT, LEFT, BAR = 720, 340, 60, 110

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:48em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}svg{width:100%;height:auto}text{font:13px system-ui,sans-serif}"""


def page(found: Mapping[str, Any]) -> str:
    """The page of what `Plan.to_dict` gives."""
    names = list(dict.fromkeys(part for phase in found["phases"] for part in phase["parts"]))
    colours = _colours(names)
    notes = "".join(f"<li>{escape(note)}</li>" for note in [*found["advice"], *found["notes"]])
    facts = [f"peak: {found['peak']:.1f} GiB, in the phase <b>{escape(found['peak_phase'])}</b>"]
    if found["card"] is not None:
        facts[0] += f", of {found['card']:.1f} GiB"
    facts.append(f"cards with room for it as it is: {escape(', '.join(found['cards']) or 'none of the table')}")
    if found["seconds_of_step"] is not None:
        seconds = sum(found["seconds_of_step"])
        facts.append(f"a step: {found['tokens_of_step']:,} tokens on a process, about {seconds:.1f} s")
    if found["hours"] is not None:
        cost = f", about {found['cost']:.2f} for all cards" if found["cost"] is not None else ""
        facts.append(f"{found['steps']:,} steps: about {found['hours']:.1f} hours{cost}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Memory of a run</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>Memory of a run</h1>\n<p>{escape(found['what'])}</p>\n"
        f"{_picture(found, colours)}\n<p>{'<br>'.join(facts)}</p>\n<ul>{notes}</ul>\n{_table(found, names, colours)}\n"
        "</body></html>\n"
    )


def _colours(names: list[str]) -> dict[str, str]:
    others = iter(FURTHER * (1 + len(names)))
    return {name: COLOURS.get(name) or next(others) for name in names}


def _picture(found: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """Bars of the phases, their parts on top of each other; a line where the card ends."""
    phases, card = found["phases"], found["card"]
    top = max([phase["total"] for phase in phases] + ([card] if card else [])) * 1.08 or 1.0
    scale = HEIGHT / top
    step = (WIDTH - LEFT) / len(phases)
    drawn = []
    for tick in _ticks(top):
        y = HEIGHT - tick * scale
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for number, phase in enumerate(phases):
        x, y = LEFT + step * (number + 0.5) - BAR / 2, float(HEIGHT)
        for name, size in phase["parts"].items():
            y -= size * scale
            drawn.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{BAR}" height="{size * scale:.2f}" fill="{colours[name]}">'
                f"<title>{escape(name)}: {size:.2f} GiB</title></rect>"
            )
        middle = x + BAR / 2
        drawn.append(f'<text x="{middle:.1f}" y="{y - 6:.1f}" text-anchor="middle">{phase["total"]:.1f}</text>')
        name = escape(phase["name"])
        drawn.append(f'<text x="{middle:.1f}" y="{HEIGHT + 18}" text-anchor="middle">{name}</text>')
    if card:
        y = HEIGHT - card * scale
        drawn.append(
            f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#c00" stroke-dasharray="6 4"/>'
            f'<text x="{WIDTH}" y="{y - 5:.1f}" text-anchor="end" fill="#c00">the card: {card:.1f} GiB</text>'
        )
    return f'<svg viewBox="0 -16 {WIDTH} {HEIGHT + 44}" role="img">{"".join(drawn)}</svg>'


def _ticks(top: float) -> list[float]:
    """Four to nine round numbers from 0 up to `top`."""
    unit = 10.0 ** (len(str(int(top))) - 1) if top >= 1 else 0.1
    unit = next(each for each in (unit / 5, unit / 2, unit, 2 * unit) if top / each < 10)
    return [unit * number for number in range(int(top / unit) + 1)]


def _table(found: Mapping[str, Any], names: list[str], colours: Mapping[str, str]) -> str:
    phases = found["phases"]
    head = "".join(f"<th>{escape(phase['name'])}</th>" for phase in phases)
    rows = []
    for name in names:
        cells = (phase["parts"].get(name) for phase in phases)
        numbers = "".join(f"<td>{'' if each is None else f'{each:.2f}'}</td>" for each in cells)
        rows.append(f'<tr><td><span style="color:{colours[name]}">&#9632;</span> {escape(name)}</td>{numbers}</tr>')
    totals = "".join(f"<td><b>{phase['total']:.2f}</b></td>" for phase in phases)
    return f"<table><tr><th>GiB</th>{head}</tr>{''.join(rows)}<tr><td><b>total</b></td>{totals}</tr></table>"
