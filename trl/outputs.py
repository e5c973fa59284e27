"""Whether a folder or a file can be written, found out before anything is loaded."""

import os
from pathlib import Path


def folder_problem(path: str | os.PathLike, new: bool = False) -> str | None:
    """The reason why nothing can be written into the folder `path`, with the remedy, or None.

    A folder that does not exist is possible if it can be made. With `new`, one that exists and holds something is not.
    """
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file, and a folder is written: name another folder, or remove the file"
    if new and folder.is_dir() and any(folder.iterdir()):
        return f"{folder} exists already: name another folder, or remove it first"
    above = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not above.is_dir():
        return f"{folder} cannot be made: {above} is a file"
    return _not_writable(above)


def file_problem(path: str | os.PathLike, replace: bool = False, remedy: str = "") -> str | None:
    """The reason why the file `path` cannot be written, with the remedy, or None.

    Its folder must exist. A file that exists is possible with `replace` alone; `remedy` is added to the sentence.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        return f"{file} is a folder, and a file is written: name a file in it"
    if file.exists() and not replace:
        return f"{file} exists already: name another file, or remove it first{remedy}"
    if not file.parent.is_dir():
        what = "is a file" if file.parent.exists() else "does not exist: make it first"
        return f"{file} cannot be written: the folder {file.parent} {what}"
    return _not_writable(file if file.exists() else file.parent)


def _not_writable(path: Path) -> str | None:
    if os.access(path, os.W_OK):
        return None
    return f"{path} is not writable for this user: name another place, or change its permissions"
