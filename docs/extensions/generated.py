"""Directives for what is made from the sources; checks that each public name has an entry, and that pages load nothing."""

import inspect
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from from_sources import options_markdown, rows_markdown
from public_names import public_names
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)


class Options(SphinxDirective):
    """Every option of a run."""

    def run(self) -> list[nodes.Node]:
        """Parse what the sources say."""
        return self.parse_text_to_nodes(options_markdown(), allow_section_headings=True)


class Readme(SphinxDirective):
    """A file of the repository as a part of a page: its pictures are shown, other files that it links to are downloads."""

    required_arguments = 1
    option_spec = {"start-after": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Parse the file, its links seen from where it lies."""
        relative, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        text, folder = Path(path).read_text(), Path(relative).parent
        text = text.split(self.options["start-after"], 1)[1] if "start-after" in self.options else text

        def seen_from_here(link: re.Match[str]) -> str:
            picture, label, target = link.groups()
            if re.match(r"#|https?:", target):
                return link[0]
            return f"![{label}](/{folder / target})" if picture else f"{{download}}`{label} </{folder / target}>`"

        return self.parse_text_to_nodes(
            re.sub(r"(!?)\[([^\]]*)\]\(([^)]+)\)", seen_from_here, text), allow_section_headings=True
        )


class Rows(SphinxDirective):
    """Every row whose loss is the argument."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse what the sources say."""
        return self.parse_text_to_nodes(rows_markdown(self.arguments[0]), allow_section_headings=True)


def own_signature(app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str, returned: str) -> Any:
    """The arguments of a class's constructor, also where a metaclass (of losses and environments) takes any."""
    if what != "class" or signature is None:
        return None
    parameters = list(inspect.signature(value.__init__).parameters.values())[1:]
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
    return str(inspect.Signature(plain)), None


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """A warning, which is an error, for each public name without an entry."""
    documented = {name for name, *_ in env.get_domain("py").get_objects()}
    for name in sorted(public_names() - documented):
        logger.warning("the reference has no entry for %s", name)


def check_offline(app: Sphinx, error: Exception | None) -> None:
    """A warning, which is an error, for each page that would load something from elsewhere."""
    loads = re.compile(r"<(?:script|img|iframe|source)[^>]+src=\"(?:https?:)?//[^\"]*|<link[^>]+href=\"(?:https?:)?//[^\"]*")
    for page in Path(app.outdir).rglob("*.html") if error is None else ():
        for found in loads.findall(page.read_text()):
            logger.warning("%s loads something from elsewhere: %s", page.relative_to(app.outdir), found)


def setup(app: Sphinx) -> dict[str, bool]:
    """Offer them to Sphinx."""
    app.add_directive("options", Options)
    app.add_directive("readme", Readme)
    app.add_directive("rows", Rows)
    app.connect("autodoc-process-signature", own_signature)
    app.connect("env-check-consistency", check)
    app.connect("build-finished", check_offline)
    return {"parallel_read_safe": True}
