"""Formulas as MathML, which browsers draw by themselves: no script is loaded from elsewhere."""

import re
from html import escape

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def formula(node: nodes.Element, display: str) -> str:
    """A formula of LaTeX, with what it was made from for those who copy it."""
    latex = node.astext()
    if display == "block" and (r"\\" in latex or "&" in latex) and r"\begin" not in latex:
        latex = rf"\begin{{align*}}{latex}\end{{align*}}"
    written = convert(latex, display=display)
    # A prime is a raised sign already; raised again it leaves the line.
    written = re.sub(r"<msup>(<mi>[^<]*</mi>)<mi>(&#x0203[23];)</mi></msup>", r"<mrow>\1<mtext>\2</mtext></mrow>", written)
    return written.replace("<math ", f'<math alttext="{escape(latex, quote=True)}" ', 1)


def visit_math(translator: HTML5Translator, node: nodes.Element) -> None:
    """A formula in a line of text."""
    translator.body.append(formula(node, "inline"))
    raise nodes.SkipNode


def visit_math_block(translator: HTML5Translator, node: nodes.Element) -> None:
    """A formula of its own, which may be wider than a narrow page."""
    translator.body.append(f'<div class="formula">{formula(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Offer it to Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True}
