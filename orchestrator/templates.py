"""Generated texts: every one comes from a Jinja2 template in templates/."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: object) -> str:
    """Return the text of a template in templates/; a value that the template misses is an error."""
    return _environment().get_template(template).render(**values)


def template_folder() -> Path:
    """Return the folder of the templates: at the top of a checkout, or in an installed wheel's data."""
    package = Path(__file__).parent
    installed = package / "data" / "templates"
    return installed if installed.is_dir() else package.parent / "templates"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=FileSystemLoader(template_folder()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=select_autoescape(["xml.j2", "svg.j2"]),  # paths may have an & in them
    )
