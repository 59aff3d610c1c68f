"""The site: ``tox -e docs``. Warnings are errors, and nothing is fetched, neither to build it nor to read it."""

import sys
from pathlib import Path

import omnet_torchrl

sys.path.append(str(Path(__file__).parent / "extensions"))

project = "omnet_torchrl"
author = "The omnet_torchrl developers"
project_copyright = f"2026, {author}"
version = release = omnet_torchrl.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_parser",
    "mathml",
    "generated",
]
exclude_patterns = ["_build"]
root_doc = "index"

# Docstrings are Google's, with the type of each argument in words.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "default_keys"}  # TorchRL's own affair
autodoc_class_signature = "mixed"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
napoleon_custom_sections = ["Keys", "Shape"]

# Our own references must resolve; those of other packages have no page here, and theirs are not fetched.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!omnet_torchrl).*"), (r"py:class", r".*\._AcceptedKeys")]
nitpick_ignore = [("py:mod", "omnet_torchrl.updates.compiled")]  # a room that has no page

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = True
suppress_warnings = ["myst.header"]  # of READMEs that are included below a heading of ours

html_theme = "furo"
html_title = f"omnet_torchrl {release}"
html_static_path = ["_static"]
html_css_files = ["omnet.css"]
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
