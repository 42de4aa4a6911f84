"""Sphinx: the pages of docs/ and a reference made of the docstrings. `make docs` builds them into build/docs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ddim_fast import __version__

project, version, release = "ddim_fast", __version__, __version__
copyright = "the authors of ddim_fast, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "ddim_fast"
exclude_patterns = ["gallery.sh"]
myst_heading_anchors = 3
# Pages link to files of the repository beside docs/ too, which are no part of the site; tests/test_docs.py checks all links.
suppress_warnings = ["myst.xref_missing"]
napoleon_custom_sections = [(name, "params_style") for name in ("Network", "Process", "Sound", "Spectrogram")]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
