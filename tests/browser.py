"""Pages under test: what is in them, and what a headless browser makes of them."""

import shutil
import subprocess
from html.parser import HTMLParser

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\' "> </title><b>&amp;'
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """Start tags with their attributes, and the text outside style and script."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self._raw = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._raw = tag if tag in ("style", "script") else None

    def handle_endtag(self, tag):
        self._raw = None

    def handle_data(self, data):
        if self._raw is None:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).replace("\N{NO-BREAK SPACE}", " ").split())


def chromium(path, folder, *options):
    """What a headless Chromium prints of a page."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
