"""Sphinx: the notebooks as a web site, from their stored outputs, without the network. Used by build.py."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from anomaly_nb import __version__

project, author, version, release = "anomaly_nb", "the anomaly_nb authors", __version__, __version__
project_copyright = "the anomaly_nb authors, Apache 2.0"
extensions = ["myst_nb", "formulas", "terms", "sidebar"]
html_math_renderer = "mathml"
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
root_doc = "index"

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}                       # widgets are for JupyterLab; here stands what they show without one
myst_enable_extensions = ["dollarmath", "deflist", "attrs_inline"]
myst_dmath_allow_labels = False
myst_dmath_double_inline = True          # $$ in the middle of a paragraph, as JupyterLab takes it
myst_heading_anchors = 3
smartquotes = False                         # quotation marks stay as they were written
highlight_language = "none"
pygments_dark_style = "a11y-dark"
python_maximum_signature_line_length = 90
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "anomaly_nb"
html_static_path = ["static"]
html_css_files = ["course.css"]
html_show_sourcelink = html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
