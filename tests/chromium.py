"""Where a Chromium is that starts, and how tests start it."""

import os
import shutil
import subprocess

import pytest

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium_path() -> str:
    """A Chromium that starts. Ubuntu's `chromium-browser` may be a stub, hence the question for its version."""
    for name in (os.environ.get("KANGAROO_CHROMIUM", ""), *CHROMIUM_NAMES):
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    pytest.fail(
        "The browser tests need Chromium or Google Chrome. Install one (Debian: sudo apt-get install chromium), "
        "or name its program in KANGAROO_CHROMIUM. `scripts/setup.sh browser` does it where apt-get works."
    )
