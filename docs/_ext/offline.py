"""Fail if a page of the built site fetches anything: ``python docs/_ext/offline.py build/site``.

Links that a reader may follow are none of it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LOADS = re.compile(
    r"<(?:script|img|iframe|source|video|link)\b[^>]*?\b(?:src|href)=[\"']((?:https?:)?//[^\"']+)"
    r"|(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]+)",
    flags=re.IGNORECASE,
)


def main(site: Path) -> int:
    """Print what is fetched, page by page; 1 if there is any, or no page."""
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    found = [
        f"{page.relative_to(site)}: {first or second}"
        for page in pages
        for first, second in LOADS.findall(page.read_text(encoding="utf-8"))
    ]
    sys.stdout.write("\n".join(found) or f"{len(pages)} pages, nothing is fetched")
    sys.stdout.write("\n")
    return int(bool(found) or not pages)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
