"""Names and reasons as MLflow's pages show them: its notes are Markdown, in which a name could be a link or a picture."""

import html
import re

from stn_pipeline.errors import masked


def escaped(text: str) -> str:
    r"""Return a text that Markdown shows as it is, on one line; also fit for a cell of a table.

    Example: >>> print(escaped("![x](http://a/b.png) <b>|_1"))
    \!\[x\]\(http://a/b.png\) &lt;b&gt;\|\_1
    """
    line = " ".join("".join(char if char.isprintable() else " " for char in masked(text)).split())
    return re.sub(r"([\\`*_{}\[\]()!|~])", r"\\\1", html.escape(line, quote=False))
