"""Sphinx's settings for the book. `make book` stages the pages and builds it (scripts/make_book.py)."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "Teach a language model to talk about money"
language = "en"
extensions = ["myst_nb"]
exclude_patterns = ["**/.ipynb_checkpoints"]

nb_execution_mode = "off"  # the notebooks were executed already; the book shows that run
nb_merge_streams = True
nb_ipywidgets_js = {}  # no scripts from elsewhere, also where a notebook kept a widget's state
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
smartquotes = False
suppress_warnings = ["myst.header"]  # exercises are headings of the third level, on a page of their own too

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_favicon = "_static/icon.svg"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False


def render_math(writer, node: nodes.Element) -> None:
    """A formula as MathML, which browsers show by themselves; MathJax would need JavaScript and a network."""
    writer.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (render_math, None), (render_math, None))
