"""Which agents a blade runs: the content hash the host wrote when it built or pushed them."""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("VERSION")
VERSION = FILE.read_text().strip() if FILE.exists() else "unbuilt"
