"""A matplotlib SVG file as part of a page: identifiers of its own, and the page's ink and paper."""

from __future__ import annotations

import re
from html import escape


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
    body = re.sub(r"#000000\b", "currentColor", body)
    body = re.sub(r"#ffffff\b", "var(--page)", body)
    head = f'<svg role="img" aria-label="{escape(label)}" fill="currentColor"'
    return body.replace("<svg", head, 1).strip()
