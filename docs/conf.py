"""Sphinx configuration: `make docs` builds these pages, and any warning fails the build."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from trl.version import __version__  # noqa: E402  # the path comes first

project = "trl"
author = "the authors of trl"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "trl_reference"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
html_theme = "furo"
html_title = f"trl {__version__}"
