"""`trl <command>`: finds the command, runs it, and prints errors as sentences.

Nothing heavy is imported before a command is known, so that `trl --help` answers at once.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from trl.cli import UsageError, nearest
from trl.compat.imports import instead
from trl.methods import METHODS
from trl.version import __version__


class Command(NamedTuple):
    module: str
    summary: str


def commands() -> dict[str, Command]:
    """The commands by name. Each module has `run(argv, command) -> int`."""
    return {
        **{
            name: Command("trl.cli.train", f"{row.title}: {row.summary}")
            for name, row in METHODS.items()
            if row.command
        },
        "chat": Command("trl.cli.chat", "talk to a model, or to two side by side"),
        "generate": Command("trl.cli.generate", "completions for a file of prompts"),
        "merge": Command("trl.cli.merge", "an adapter into its base model, checked"),
        "plan": Command("trl.cli.plan", "memory, time and cost of a run, before anything is loaded"),
        "export": Command("trl.cli.export", "a model as safetensors or GGUF, checked"),
        "completion": Command("trl.cli.completion", "print a script that completes commands and options in a shell"),
        "config": Command("trl.cli.config", "write a YAML file with every option of a method, or check one"),
        "data": Command("trl.cli.data", "show a data set as it would be trained on; `data convert`: other shapes"),
        "demo": Command("trl.cli.demo", "train a small real model on this machine, offline, and evaluate it"),
        "eval": Command("trl.cli.eval", "measure a model on a data set, each number with a confidence interval"),
        "env": Command("trl.cli.env", "versions and devices, to paste into a bug report"),
    }


def help_text() -> str:
    lines = [
        "usage: trl [--debug] <command> [options]",
        "",
        "Post-training of language models.",
        "",
        "commands:",
        *(f"  {name:<14}{command.summary}" for name, command in commands().items()),
        "",
        "options:",
        "  -h, --help     this text; after a command, its options",
        "  -V, --version  the version of trl",
        "  --debug        show the traceback of an error (or set TRL_DEBUG=1)",
        "",
        "exit status: 0 done, 1 failed (the demo: did not learn), 2 wrong command line or file, 130 interrupted",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    atexit.register(gc.freeze)  # a last look for garbage, through all that was imported, takes a second or two
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("TRL_DEBUG", "") not in ("", "0")
    if argv[:1] == ["--debug"]:
        debug, argv = True, argv[1:]

    if argv[0:1] == ["help"] and argv[1:2] and argv[1] in commands():
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        # On request, help goes to stdout; without a command, it is an error.
        print(help_text(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"trl {__version__}")
        return 0

    name, rest = argv[0], argv[1:]
    known = commands()
    if name not in known:
        what = "option" if name.startswith("-") else "command"
        if what == "command" and (reason := instead(name.replace("-", "_"))):
            print(f"trl: there is no command {name}: {reason}. `trl --help` lists the commands.", file=sys.stderr)
            return 2
        meant = nearest(name, known)
        print(f"trl: there is no {what} {name}{meant} `trl --help` lists them.", file=sys.stderr)
        return 2
    if "--verbose" not in rest:
        os.environ.setdefault("TQDM_DELAY", "2")  # bars of less than two seconds stay away; tqdm reads it at its import
    run: Callable[[Sequence[str], str], int]
    try:
        run = import_module(known[name].module).run
        return run(rest, name)
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
        print(f"\ntrl {name}: interrupted{'. ' if str(interrupt) else ''}{interrupt}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        if debug:
            raise
        print(f"trl {name}: {error}", file=sys.stderr)
        return 2
    except (ValueError, ArithmeticError, OSError, ImportError) as error:
        # Errors that a user can correct: rows, paths, options, missing packages, a diverging loss. Any other error is a
        # bug, and its traceback is the most useful output.
        if debug:
            raise
        message = str(error).strip() or type(error).__name__
        print(f"trl {name}: {message}\n(TRL_DEBUG=1 shows the traceback.)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
