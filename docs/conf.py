"""Configuration of the documentation: `make docs`."""

import mmtx

project = "mmtx"
author = "the mmtx authors"
release = version = mmtx.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
html_theme = "furo"
html_title = "mmtx"
html_static_path = []
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
# Links to files of the repository that are no pages; tests/test_docs.py sees that they lead somewhere.
suppress_warnings = ["myst.xref_missing"]
