"""Whether the Hub has a model or a data set of a name. It is asked once, where a loader would ask a dozen times."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from trl.near import near

SECONDS = 10  # that the Hub has to answer in


class HubError(ValueError):
    """There is nothing of this name on the Hub, or it cannot be asked; `reached` says which."""

    def __init__(self, sentence: str, reached: bool) -> None:
        super().__init__(sentence)
        self.reached = reached


@cache  # an answer, not an error
def check_hub(name: str, kind: str = "model", revision: str | None = None, files: Sequence[str] = ()) -> None:
    """Raise `HubError` if the Hub has nothing of this name. Nothing is downloaded.

    kind        model or dataset
    revision    branch, tag or commit; None: main
    files       those one of which in the cache means that the Hub need not be asked
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    what = {"dataset": "data set"}.get(kind, kind)
    absent = f"there is no {'file or ' * (kind == 'dataset')}folder {name} here{meant(Path(name))}"
    try:
        cached = [try_to_load_from_cache(name, file, revision=revision, repo_type=kind) for file in files]
    except errors.HFValidationError:
        sentence = f"{absent}, and it cannot be a name on the Hub, which is `name` or `owner/name`"
        raise HubError(sentence, True) from None
    if any(isinstance(each, str) for each in cached):
        return
    if constants.HF_HUB_OFFLINE:
        sentence = f"{absent}, nor a copy in the cache, and the Hub is not asked (HF_HUB_OFFLINE=1): check the name"
        raise HubError(sentence, False)
    try:
        get_hf_file_metadata(hf_hub_url(name, "README.md", revision=revision, repo_type=kind), timeout=SECONDS)
    except errors.RevisionNotFoundError:
        raise HubError(f"the {what} {name} on the Hub has no revision {revision}: check it", True) from None
    except errors.GatedRepoError:
        raise HubError(
            f"the {what} {name} asks for an agreement: accept it on its page on the Hub, then log in with "
            "`hf auth login`",
            True,
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{absent}, and the Hub has no {what} of this name: check it (if it is private: `hf auth login`)",
            True,
        ) from None
    except (errors.HfHubHTTPError, errors.EntryNotFoundError):
        return  # a repository without this file, or trouble on the Hub, which loading tells
    except Exception as error:  # of the library under huggingface_hub, which has changed with its releases
        raise HubError(f"{absent}, and the Hub cannot be reached: check the name, or the network", False) from error


def meant(path: Path) -> str:
    """The neighbour of a path that does not exist which was probably meant, as the end of a clause, or nothing."""
    if not path.parent.is_dir():
        return ""
    there = {each.stem: each.name for each in path.parent.iterdir()}  # endings would make all files alike
    match = near(path.stem, there)
    return f" (did you mean {path.parent / there[match]}?)" if match else ""
