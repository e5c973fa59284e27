"""What the name of a data set is, by its form alone: a path, or a name on the Hub. Imports nothing heavy."""

from pathlib import Path

from trl.data.reading.errors import DataError
from trl.hub import HubError, check_hub, meant

BUILDERS = {  # ending of the file name -> the reader of `datasets`
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def endings(name: str | Path) -> tuple[str, str]:
    """The ending of a file name that tells the format (".jsonl"), and the ending of its compression (".gz"), or ""."""
    path = Path(name)
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in COMPRESSIONS else (last, "")


def looks_like_a_path(name: str) -> bool:
    """Whether it cannot be a name on the Hub, which is `name` or `owner/name`, and may contain dots."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or endings(name)[0] in BUILDERS or "\\" in name


def check_path(name: str) -> None:
    """Raise `DataError` if `name` can only be a path, and nothing is there."""
    path = Path(name).expanduser()
    if looks_like_a_path(name) and not path.exists():
        raise DataError(f"There is no file or folder {str(path)!r} (that is {path.absolute()}): check it{meant(path)}.")


def check_name(name: str) -> None:
    """Raise `DataError` if no data set of this name is on the Hub, or in the cache where the Hub is not reached."""
    import datasets

    try:
        check_hub(name, "dataset")
    except HubError as error:
        if error.reached or not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists():
            raise DataError(f"Cannot load {name!r}: {error}.") from error
