"""A matplotlib SVG file as part of a page: identifiers of its own, and the page's ink and paper."""

from __future__ import annotations

import re
from html import escape

from harness.report.figures.style import GRID, INK, PAPER, SOFT


def inline_svg(text: str, name: str, label: str) -> str:
    """The <svg> element of a file, its identifiers prefixed by `name`, black and white following the page's theme."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<title>.*?</title>", "", body, flags=re.DOTALL)
    prefix = f"{name}-"
    body = re.sub(r'\bid="([^"]+)"', lambda found: f'id="{prefix}{found[1]}"', body)
    body = re.sub(r'href="#([^"]+)"', lambda found: f'href="#{prefix}{found[1]}"', body)
    body = re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{prefix}{found[1]})", body)
    # Letters and axes have no colour of their own or are black; the background and hollow marks are white.
    body = re.sub(rf"{INK}\b", "currentColor", body)
    for colour, name in ((PAPER, "page"), (GRID, "line"), (SOFT, "soft")):
        body = re.sub(rf"{colour}\b", f"var(--{name})", body)
    head = f'<svg role="img" aria-label="{escape(label)}" fill="currentColor"'
    return body.replace("<svg", head, 1).strip()
