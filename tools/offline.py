"""Quarto post-render: a site that asks no other host for anything and works from disk.

Deletes the require.js and jQuery tags that pages with tables get, makes links to the site's own
address relative, strips the `#LNone` anchors of source links, closes the folds of exported source, which
nbdev forces open, and turns the Markdown links that nbdev writes into signatures back into code. Quarto names the output folder in
QUARTO_PROJECT_OUTPUT_DIR; by hand: `python tools/offline.py _site`.
"""

import os
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CDN = re.compile(r'<script[^>]+src="https?://[^"]*(?:require(?:\.min)?|jquery(?:\.min)?)\.js"[^>]*>\s*</script>\s*')
EXPORTED = re.compile(r'(<details[^>]*?) open(?:="[^"]*")?([^>]*>\s*<summary>Exported source)')
SIGNATURE = re.compile(r"\[`([^`<\]]*)`\]\((?:<a [^>]*>)?https?://[^)<\s]*(?:</a>)?\)")
PREFORMATTED = re.compile(r"<pre.*?</pre>", re.S)
JQUERY_DEFINE = re.compile(r"<script[^>]*>\s*define\('jquery',.*?</script>\s*", re.S)


def site_url() -> str:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["doc_host"] + config["DEFAULT"]["doc_baseurl"]


def offline(html: str, depth: int, url: str) -> str:
    "One page's HTML without requests to other hosts; `depth`: folders between the page and the site's root."
    html = JQUERY_DEFINE.sub("", CDN.sub("", html))
    root = "../" * depth or "./"
    html = re.sub(rf'(href|src)="{re.escape(url)}/?', rf'\1="{root}', html)
    html = EXPORTED.sub(r"\1\2", html)
    html = PREFORMATTED.sub(lambda block: SIGNATURE.sub(r"\1", block[0]), html)
    return html.replace("#LNone", "")


def main(folder: Path) -> int:
    url = site_url()
    for page in folder.rglob("*.html"):
        old = page.read_text(encoding="utf-8")
        new = offline(old, len(page.relative_to(folder).parts) - 1, url)
        if new != old:
            page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("QUARTO_PROJECT_OUTPUT_DIR", "_site"))))
