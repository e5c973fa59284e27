"""Whether there is a model of a name: a folder here, a copy in the cache, or a repository on the Hub."""

from functools import cache
from pathlib import Path

from trl.near import near

FILES = ("config.json", "adapter_config.json")
TOKENIZER = ("tokenizer_config.json", "tokenizer.json")
SECONDS = 10  # that the Hub has to answer in


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
        raise ModelError(f"no model folder at {name_or_path}{_meant(path)}")
    elif ask:
        _check_hub(name_or_path, revision, (*FILES, *needs))


@cache  # an answer, not an error
def _check_hub(name: str, revision: str | None, files: tuple[str, ...]) -> None:
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    absent = f"there is no folder {name} here{_meant(Path(name))}"
    try:
        cached = [try_to_load_from_cache(name, file, revision=revision) for file in files]
    except errors.HFValidationError:
        raise ModelError(f"{absent}, and it cannot be a name on the Hub, which is `name` or `owner/name`") from None
    if any(isinstance(each, str) for each in cached):
        return
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{absent}, nor a copy in the cache, and the Hub is not asked (HF_HUB_OFFLINE is set): check the name"
        )
    try:
        get_hf_file_metadata(hf_hub_url(name, FILES[0], revision=revision), timeout=SECONDS)
    except errors.RevisionNotFoundError:
        raise ModelError(f"the model {name} on the Hub has no revision {revision}: check model_revision") from None
    except errors.GatedRepoError:
        raise ModelError(
            f"the model {name} asks for an agreement: accept it on its page on the Hub, then log in with "
            "`hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{absent}, and the Hub has no model of this name: check it; if it is private, log in with `hf auth login`"
        ) from None
    except errors.HfHubHTTPError:
        return  # an adapter's repository, or trouble on the Hub: loading the model tells
    except Exception as error:  # of the library under huggingface_hub, which has changed with its releases
        raise ModelError(f"{absent}, and the Hub cannot be reached: check the name, or the network") from error


def _meant(path: Path) -> str:
    """The folder that was probably meant, as the end of a clause, or nothing."""
    if not path.parent.is_dir():
        return ""
    match = near(path.name, (each.name for each in path.parent.iterdir() if each.is_dir()))
    return f" (did you mean {path.parent / match}?)" if match else ""
