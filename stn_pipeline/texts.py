"""Text that somebody else wrote (names, paths, file contents), made harmless where it is shown: on a console, in Markdown."""

import re
import sys

MOST_SHOWN = 2000  # characters of a message
MOST_QUOTED = 120  # characters of a value inside one
_MARKDOWN = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;"} | {mark: f"\\{mark}" for mark in "\\`*_[]|~#"})


def masked(text: str) -> str:
    """Return a text without what stands before the @ of an address, nor its secret parameters: users and passwords."""
    text = re.sub(r"(?<=://)(?:[^\s/:@]*:\S*|[^\s/@]*)@", "***@", text)
    return re.sub(r"(?i)([?&;][\w-]*(?:password|passwd|pwd|token|secret|key)[\w-]*=)[^\s&;'\"]+", r"\1***", text)


def printable(text: object, most: int = MOST_SHOWN) -> str:
    r"""Return text as one line of visible characters; what is too long loses its middle.

    Control and escape codes, line ends, bidirectional overrides and surrogates (bytes of a command line that are not UTF-8)
    become escapes, so no name can clear a terminal, or write a line of its own. Passwords are masked.

    Example:
        >>> print(printable("a\x1b[2J\nerror: fake \u202e"))
        a\x1b[2J\nerror: fake \u202e
    """
    shown = "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode("ascii") for mark in masked(str(text)[: 10 * most])
    )
    return shown if len(shown) <= most else f"{shown[: most - most // 3]} ... {shown[-(most // 3) :]}"


def quoted(value: object) -> str:
    """Return a value as a message shows it: one short line."""
    return printable(" ".join(str(value).split()), MOST_QUOTED)


def markdown(text: object) -> str:
    r"""Return text that Markdown shows as it is: no link, image, emphasis, HTML or table cell comes of it.

    Example:
        >>> print(markdown("a_b ![](https://x.org/i.png) | <b>"))
        a\_b !\[\](https:&#47;&#47;x.org/i.png) \| &lt;b&gt;
    """
    shown = printable(text, 10 * MOST_SHOWN).translate(_MARKDOWN).replace("://", ":&#47;&#47;")
    return re.sub(r"(?i)\bwww\.", lambda found: f"{found[0][:-1]}&#46;", shown)


def code(text: object) -> str:
    """Return text as a span of code in Markdown, whatever backticks it holds."""
    shown = printable(text, 10 * MOST_SHOWN)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}{shown}{fence}" if len(fence) == 1 else f"{fence} {shown} {fence}"


def say(text: object, *, error: bool = False) -> None:
    """Print a line on the console: what every message that holds a name, a path or a value goes through."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)
