"""Sphinx configuration: the package must be installed, nothing is fetched."""

from __future__ import annotations

import sys
from pathlib import Path

from rgap._version import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "rgap"
author = "the rgap authors"
release = version = __version__

extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
templates_path = ["_templates"]
exclude_patterns = ["_build", "_ext"]
html_math_renderer = "mathml"
default_role = "py:obj"  # docstrings write `Update` for a reference, resolved where there is one

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autosummary_filename_map = {  # apart from the class of that name where file names ignore case
    "rgap.analysis.audit": "rgap.analysis.audit-function",
    "rgap.analysis.identifiability": "rgap.analysis.identifiability-function",
}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True  # attributes of a dataclass as a list, not as objects of their own

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
pygments_style = "friendly"

html_theme = "furo"
html_title = f"rgap {release}"
html_theme_options = {"navigation_with_keys": True}
html_show_copyright = False
html_show_sphinx = False
