"""What commands on trained models share: options, missing ones, and results that a program may read (`--json`)."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trl.cli import UsageError, notices_aside
from trl.models.names import check_model


@dataclass
class ReplyFields:
    """How the command answers."""

    json: bool = field(default=False, metadata={"help": "Print the result as JSON on stdout, all else on stderr."})


@dataclass
class WriteFields:
    """How a model is written."""

    device: str | None = field(default=None, metadata={"help": "Device that computes. Default: the CPU."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of weights (safetensors)."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the checkpoint."})
    push: str | None = field(default=None, metadata={"help": "Repository on the Hub to push the folder to."})
    private: bool | None = field(default=None, metadata={"help": "Make that repository private, if it is new."})

    def arguments(self) -> dict[str, Any]:
        """The arguments of the function that writes."""
        code = {"trust_remote_code": True} if self.trust_remote_code else {}
        return {"device": self.device, "max_shard_size": self.max_shard_size, **code}

    def pushed(self, folder: str) -> dict[str, str]:
        """Push the folder if that is asked for; the address of the repository as a fact of the result."""
        if not self.push:
            return {}
        from trl.models.saving import push_folder

        return {"pushed": push_folder(folder, self.push, private=self.private)}


def check_given(values: Mapping[str, Any], needed: Mapping[str, str]) -> None:
    """Raise UsageError for the first option of `needed` that is not among the values; its words say what it is."""
    for name, what in needed.items():
        if not values.get(name):
            raise UsageError(f"--{name} is missing: {what}.")


def check_models(values: Mapping[str, Any]) -> None:
    """Raise `ModelError` if a model that the options name is not there."""
    for name in ("model_name_or_path", "adapter_name_or_path", "compare"):
        if values.get(name):
            check_model(values[name], values.get("model_revision") if name == "model_name_or_path" else None)


@contextlib.contextmanager
def reply(as_json: bool) -> Iterator[Callable[[Any, str], None]]:
    """A function that prints a result: its facts as one line of JSON, or a text. With JSON, what else is printed within
    the context goes to stderr."""
    out = sys.stdout

    def answer(facts: Any, text: str) -> None:
        print(json.dumps(facts, ensure_ascii=False) if as_json else text, file=out, flush=True)

    with notices_aside(as_json):
        yield answer
