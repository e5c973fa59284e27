"""`trl completion`: scripts with which a shell completes commands and options.

The scripts ask `trl completion candidates` at each press of Tab. The options of the training commands come from the
cache of the help. Until a command has run once, its most used options are completed.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from importlib import import_module

from trl.cli import CommandParser, train
from trl.cli.flags import stored
from trl.methods import METHODS

DESCRIPTION = "Prints a script with which a shell completes the commands and options of trl, and the names of values."
EXAMPLES = """examples:
  eval "$(trl completion bash)"                                       bash, in ~/.bashrc
  eval "$(trl completion zsh)"                                        zsh, in ~/.zshrc, after compinit
  trl completion fish > ~/.config/fish/completions/trl.fish           fish"""
SCRIPTS = {
    "bash": """_trl() {
    local IFS=$'\\n'
    COMPREPLY=($(trl completion candidates -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _trl trl""",
    "zsh": """_trl() {
    local -a found
    found=(${(f)"$(trl completion candidates -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( ${#found} )); then compadd -- $found; else _files; fi
}
compdef _trl trl""",
    "fish": """function __trl_candidates
    set -l before (commandline -opc)
    set -e before[1]
    trl completion candidates -- $before (commandline -ct) 2>/dev/null
end
complete -c trl -a '(__trl_candidates)'""",
}


def run(argv: Sequence[str], command: str) -> int:
    if list(argv[:2]) == ["candidates", "--"]:
        print("\n".join(candidates(argv[2:])))
        return 0
    parser = CommandParser(f"trl {command}", DESCRIPTION, EXAMPLES)
    parser.add_argument("shell", choices=sorted(SCRIPTS), help="shell that the script is for")
    print(SCRIPTS[parser.parse_args(argv).shell])
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    """What the last of `words`, which follow `trl`, may become: commands, options, or the values of an option. Nothing
    where a path or a free value is expected."""
    from trl.cli.main import commands

    *before, word = words or [""]
    if not before:
        found = [*commands(), "--help", "--version"]
    elif before[0] not in commands():
        found = []
    elif word.startswith("-"):
        found = options_of(before[0])
    else:
        found = values_of(before[0], before[-1])
    return [each for each in found if each.startswith(word)]


def options_of(command: str) -> list[str]:
    """The options of a command."""
    flags = stored(command)
    if flags is None and command not in METHODS:
        return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", _help(command))))
    names = [*flags.fields, *flags.foreign] if flags else [name for group in train.COMMON.values() for name in group]
    return [f"--{name}" for name in ["config", "help", "help-all", *names]]


def values_of(command: str, option: str) -> list[str]:
    """The names among which an option of a command chooses, if it does, or its first word."""
    if option == command:
        methods = [name for name, row in METHODS.items() if row.command]
        first = {"config": methods, "plan": methods, "completion": sorted(SCRIPTS), "data": ["convert"]}
        return first.get(command, [])
    if not option.startswith("--"):
        return []
    flags = stored(command)
    flag = flags.fields.get(option[2:].replace("-", "_")) if flags else None
    return [str(choice) for choice in flag.kind.choices] if flag else []


def _help(command: str) -> str:
    """The help text of a command that is not a training command."""
    from trl.cli.main import commands

    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.suppress(SystemExit):
        import_module(commands()[command].module).run(["--help"], command)
    return heard.getvalue()
