"""Whether there is a model of a name: a folder here, a copy in the cache, or a repository on the Hub."""

from pathlib import Path

from trl.hub import HubError, check_hub, meant

FILES = ("config.json", "adapter_config.json")
TOKENIZER = ("tokenizer_config.json", "tokenizer.json")


class ModelError(ValueError):
    """A model cannot be loaded or trained; the message gives the remedy."""


def looks_local(name_or_path: str) -> bool:
    """Whether it can only be a path. `name` and `owner/name` may also be names on the Hub."""
    return name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1


def check_model(name_or_path: str, revision: str | None = None, needs: tuple[str, ...] = (), ask: bool = True) -> None:
    """Raise `ModelError` if there is no model of this name. Nothing is downloaded: for a name on the Hub that is not in
    the cache, the Hub is asked once.

    revision    branch, tag or commit on the Hub; None: main
    needs       files one of which makes a folder a model's too, beside config.json and adapter_config.json
    ask         False: a name on the Hub is left to the loader
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not any((path / name).exists() for name in (*FILES, *needs)):
            raise ModelError(
                f"{name_or_path} is a folder without config.json or adapter_config.json: not a saved model"
            )
    elif path.exists():
        raise ModelError(f"{name_or_path} is a file: a model is the folder that it was saved in, or a name on the Hub")
    elif looks_local(name_or_path):
        raise ModelError(f"no model folder at {name_or_path}{meant(path)}")
    elif ask:
        try:
            check_hub(name_or_path, revision=revision, files=(*FILES, *needs))
        except HubError as error:
            raise ModelError(str(error)) from error
