"""The reference pages, generated from the code: options of commands, public names, methods.

trl-commands   one section for each command: what `trl <command> --help` shows, and the options of its own
trl-methods    the table of methods
trl-api        every name of `trl.__all__`, by autodoc
"""

import argparse
import re
from itertools import takewhile
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import trl
from trl.cli import launch
from trl.cli.parser import Parser
from trl.cli.train import COMMON, NOTES
from trl.config import RewardArguments
from trl.data.mixture import DatasetMixtureConfig
from trl.methods import METHODS, Method


def parser_of(command: str, method: Method) -> Parser:
    """The parser of a command, as `trl.cli.train` makes it."""
    script = RewardArguments if method.judged else trl.ScriptArguments
    return Parser(
        [script, DatasetMixtureConfig, trl.ModelConfig, getattr(trl, f"{method.name}Config")],
        prog=f"trl {command}",
        description=f"{method.title[0].upper()}{method.title[1:]}: trains on {method.summary}.",
        common=COMMON,
        notes=NOTES,
        foreign=launch.options,
    )


def table(head: list[str], rows: list[list[nodes.Node]], widths: list[int]) -> nodes.table:
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=width) for width in widths]
    group += nodes.thead("", _row([nodes.Text(word) for word in head]))
    body = nodes.tbody()
    body += [_row(row) for row in rows]
    group += body
    return nodes.table("", group)


def _row(cells: list[nodes.Node]) -> nodes.row:
    return nodes.row("", *[nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells])


def _options(actions: list[argparse.Action]) -> nodes.table:
    rows: list[list[nodes.Node]] = []
    for action in actions:
        value = f" {action.metavar}" if action.metavar else ""
        name = nodes.literal(text=f"{action.option_strings[-1]}{value}")
        rows.append([name, nodes.Text((action.help or "").replace("%%", "%"))])
    return table(["option", "meaning"], rows, [35, 65])


class Commands(SphinxDirective):
    """`trl-commands`: shared options once, then a section for each command."""

    def run(self) -> list[nodes.Node]:
        parsers = {name: parser_of(name, method) for name, method in METHODS.items() if method.command}
        groups = [
            {title: {action.dest for action in group} for title, group in parser._groups.items()}
            for parser in parsers.values()
        ]
        shared = [title for title in groups[0] if all(title in each for each in groups)]
        found: list[nodes.Node] = []
        for name, parser in parsers.items():
            own = [title for title in parser._groups if title not in shared]
            section = self._section(f"trl {name}", f"trl-{name}")
            section += nodes.literal_block(text=parser.help(everything=False), language="text")
            for title in own:
                section += nodes.rubric(text=title)
                section += _options(parser._groups[title])
            found.append(section)
        section = self._section("Options of every command", "options-of-every-command")
        first = next(iter(parsers.values()))
        for title in shared:
            section += nodes.rubric(text=title)
            section += _options(first._groups[title])
        return [*found, section]

    def _section(self, title: str, anchor: str) -> nodes.section:
        section = nodes.section(ids=[anchor])
        section += nodes.title(text=title)
        self.state.document.note_implicit_target(section, section)
        return section


class Methods(SphinxDirective):
    """`trl-methods`: a row for each method, with its command, its classes and its paper."""

    def run(self) -> list[nodes.Node]:
        rows = []
        for name, method in METHODS.items():
            command = nodes.literal(text=f"trl {name}") if method.command else nodes.Text("a loop of your own")
            paper: nodes.Node = nodes.Text("")
            if method.paper:
                address = f"https://arxiv.org/abs/{method.paper.arxiv}"
                paper = nodes.reference(text=f"arXiv:{method.paper.arxiv}", refuri=address)
            rows.append([command, nodes.literal(text=f"{method.name}Trainer"), nodes.Text(method.summary), paper])
        return [table(["command", "class", "trains on", "paper"], rows, [18, 22, 42, 18])]


class Api(SphinxDirective):
    """`trl-api`: the public names, by where they belong."""

    def run(self) -> list[nodes.Node]:
        names = [name for name in trl.__all__ if not name.startswith("__")]
        trainers = [name for name in names if name.endswith("Trainer")]
        configs = [name for name in names if name.endswith(("Config", "Arguments"))]
        judges = [name for name in names if name.endswith("Judge")]
        rest = [name for name in names if name not in {*trainers, *configs, *judges}]
        parts = {"Trainers": trainers, "Configurations": configs, "Judges": judges, "Functions and helpers": rest}
        found: list[nodes.Node] = []
        for title, members in parts.items():
            section = nodes.section(ids=[title.lower().replace(" ", "-")])
            section += nodes.title(text=title)
            lines = []
            for name in members:
                value = getattr(trl, name)
                kind = "autoclass" if isinstance(value, type) else "autofunction" if callable(value) else "autodata"
                lines += ["```{eval-rst}", f".. {kind}:: trl.{name}"]
                members_of = ["   :members:", "   :exclude-members: config_class"] if name in trainers else []
                lines += [*members_of, "```", ""]
            self.state.nested_parse(StringList(lines, source=self.env.docname), self.content_offset, section)
            found.append(section)
        return found


def docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with code in single backticks: made into reStructuredText that says the same."""
    found = []
    for block in "\n".join(lines).strip("\n").split("\n\n"):
        flush = list(takewhile(lambda line: not line.startswith((" ", "- ")), block.splitlines()))
        rest = block.splitlines()[len(flush) :]
        if flush:
            found.append(_escaped(" ".join(flush)))
        if rest:  # a table or a list: as it is
            found.append("::\n\n" + "\n".join(f"    {line}" for line in rest))
    lines[:] = [*"\n\n".join(found).splitlines(), ""]


def _escaped(text: str) -> str:
    found = ""
    for part in re.split(r"(`[^`]+`)", text):
        code = re.fullmatch(r"`[^`]+`", part)
        joined = part[:1].isalnum() if found.endswith("``") else code and found[-1:].isalnum()
        found += r"\ " if joined else ""  # an escaped space, which is not shown: code ends where a word ends
        found += f"``{part[1:-1]}``" if code else re.sub(r"([*_|\\`])", r"\\\1", part)
    return found


def signature(app: Sphinx, what: str, name: str, value: Any, options: Any, sig: str, returns: str) -> Any:
    """A configuration's arguments are its options, which the page of the commands lists."""
    return ("(...)", None) if name.endswith(("Config", "Arguments")) else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("trl-commands", Commands)
    app.add_directive("trl-methods", Methods)
    app.add_directive("trl-api", Api)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True}
