"""Formulas as MathML in the page itself: browsers draw them, nothing is fetched or run."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.locale import _
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

LOG = logging.getLogger(__name__)
WORDS = {
    r"\lVert": r"\Vert", r"\rVert": r"\Vert", r"\lvert": "|", r"\rvert": "|",
    r"\arg": r"\operatorname{arg}",
}  # fmt: skip


def setup(app: Sphinx) -> dict[str, Any]:
    """The renderer ``mathml``."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def inline(self: HTML5Translator, node: nodes.math) -> None:
    """A formula in a line."""
    self.body.append(mathml(node.astext(), "inline", node))
    raise nodes.SkipNode


def block(self: HTML5Translator, node: nodes.math_block) -> None:
    """A displayed one, with its number and a link to it."""
    self.body.append(self.starttag(node, "div", CLASS="math notranslate nohighlight"))
    if node["number"]:
        number = get_node_equation_number(self, node)
        self.body.append(f'<span class="eqno">({number})')
        self.add_permalink_ref(node, _("Link to this equation"))
        self.body.append("</span>")
    self.body.append(mathml(node.astext(), "block", node))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def mathml(latex: str, display: str, node: nodes.Node) -> str:
    """Of LaTeX; what cannot be translated is a warning, which ends the build."""
    for word, other in WORDS.items():
        latex = re.sub(re.escape(word) + r"(?![a-zA-Z])", lambda _, o=other: o, latex)
    latex = re.sub(r"\\label\{[^}]*\}", "", latex)
    try:
        made = convert(latex, display=display)
    except Exception as error:  # the package has an error for every mistake
        LOG.warning("no MathML of %r: %r", latex, error, location=node)
        return ""
    left = re.findall(r"<m(?:i|o|text)>(\\[a-zA-Z]+)</m", made)
    if left:
        LOG.warning("no MathML of %s in %r", ", ".join(left), latex, location=node)
    return made
