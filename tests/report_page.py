"""A report read as a browser would: for the tests of every report."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Checks that tags nest, and collects the text and what a page could request or run."""

    VOID = {"meta", "br", "hr", "img", "input", "link"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes the wrong element"

    def handle_data(self, words):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(words)

    @property
    def text(self):
        return re.sub(r"[ \n]+", " ", " ".join(self.words))


def assert_needs_nothing(html: str) -> Page:
    """Nothing on the page asks for anything or runs, its own one script apart."""
    parsed = Page(html)
    assert parsed.tags.count("script") == 1
    assert not {"link", "img", "iframe", "object", "embed"} & set(parsed.tags)
    assert "src" not in {name for _, name, _ in parsed.attributes}
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)
    assert "default-src 'none'" in html
    assert not [a for a in parsed.attributes if a[1].startswith("on")]
    return parsed
