"""Sphinx configuration: python -m sphinx -W --keep-going -b html docs docs/_build/html."""

import re
from pathlib import Path

# Read, not imported: building the documentation needs neither Django nor a driver.
_PACKAGE = Path(__file__).parent.parent / "src" / "django_scaledb" / "__init__.py"
_VERSION = re.search(r'__version__ = "(.+)"', _PACKAGE.read_text())
assert _VERSION is not None

project = "django_scaledb"
author = "The django_scaledb developers"
project_copyright = author
release = version = _VERSION[1]

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"django_scaledb {release}"
html_copy_source = False
