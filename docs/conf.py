"""The reference (`make docs`): these guides, and every module's docstrings, without running JAX."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "ssd_jax"
author = "the ssd_jax authors"
project_copyright = author
html_title = project
html_theme = "furo"
extensions = [
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
]
exclude_patterns = ["_build", "api/modules.rst"]
apidoc_modules = [
    {
        "path": str(ROOT / "ssd_jax"),
        "destination": "api",
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members", "undoc-members", "show-inheritance"},
    }
]
autodoc_member_order = "bysource"
autodoc_default_options = {"special-members": "__call__"}
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
# What a class holds is told by its docstring; the fields need no second entry.
napoleon_use_ivar = True
# A reference to something of this package must be found; those to others are just names.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!ssd_jax).*|.*\b_[a-zA-Z].*")]
# Guides link to files of the repository that are no pages.
suppress_warnings = ["myst.xref_missing"]
