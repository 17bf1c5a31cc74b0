"""Headless Chromium, as a person's browser would open a page that the project writes."""

import re
import shutil
import subprocess
from pathlib import Path

from .services import unavailable

NAMES = ("chromium", "chromium-browser", "google-chrome")
MEASURE = """
<script>
  const hidden = Array.from(document.querySelectorAll("*"), each => getComputedStyle(each).overflowX == "auto"
    ? each.scrollWidth - each.clientWidth : 0);
  document.documentElement.dataset.measured =
    [document.documentElement.scrollWidth, innerWidth, Math.max(...hidden)].join("/");
</script>
"""


class Chromium:
    """Opens a page in a window of some width; each call is a browser of its own, without network."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program = program
        self.folder = folder

    def _run(self, page: Path, width: int, *options: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [
                self.program,
                "--headless",
                "--no-sandbox",  # as root, in a container
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={self.folder / 'profile'}",
                f"--window-size={width},1400",
                *options,
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    def document(self, page: Path, width: int = 1200) -> str:
        """What the browser made of it."""
        return self._run(page, width, "--dump-dom").stdout

    def screenshot(self, page: Path, width: int = 1200) -> Path:
        picture = self.folder / f"{page.stem}-{width}.png"
        self._run(page, width, f"--screenshot={picture}")
        return picture

    def overflow(self, page: Path, width: int) -> int:
        """Pixels by which the page is wider than its window."""
        wide, window, _ = self._measured(page, width)
        return wide - window

    def hidden(self, page: Path, width: int) -> int:
        """Pixels of the widest part that has to be scrolled sideways to be seen whole."""
        return self._measured(page, width)[2]

    def _measured(self, page: Path, width: int) -> tuple[int, int, int]:
        measured = self.folder / "measured.html"
        measured.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"))
        found = re.search(r'data-measured="(\d+)/(\d+)/(\d+)"', self.document(measured, width))
        assert found, "the page was not laid out"
        return int(found[1]), int(found[2]), int(found[3])


def chromium(folder: Path) -> Chromium:
    """Skips the test where there is none, or fails it where services are a must."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        unavailable(f"Chromium is not installed: none of {', '.join(NAMES)} is on the PATH.")
    return Chromium(str(program), folder)
