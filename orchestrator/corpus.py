"""A real English text for demos, tests and experiments: the GNU Collaborative International Dictionary of English."""

from __future__ import annotations

import gzip
import os
import subprocess
from pathlib import Path

from orchestrator.errors import RacklessError
from orchestrator.image import cache
from orchestrator.settings import Settings

PACKAGE = "dict-gcide"  # the same in Debian and Ubuntu; taken apart, not installed
_TEXT = "usr/share/dictd/gcide.dict.dz"
_NAME = "english.txt"


def english(settings: Settings) -> Path:
    """Path of the text, some 40 MB; fetched with apt at the first call. RacklessError when it is not to be had."""

    def fetch(work: Path) -> None:
        # apt drops to its own user to download, who may not write into our cache.
        done = subprocess.run(["apt-get", "-o", "APT::Sandbox::User=root", "download", PACKAGE],
                              cwd=work, capture_output=True, text=True, check=False)  # fmt: skip
        packages = list(work.glob(f"{PACKAGE}_*.deb"))
        if done.returncode or not packages:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise RacklessError(f"cannot fetch the package {PACKAGE}: {reason}", hint="run `apt-get update`")
        archive = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", packages[0]], stdout=subprocess.PIPE, check=True
        ).stdout
        packed = subprocess.run(
            ["tar", "-xO", f"./{_TEXT}"], input=archive, stdout=subprocess.PIPE, check=True
        ).stdout
        (work / _NAME).write_bytes(gzip.decompress(packed))
        for package in packages:
            os.unlink(package)

    return cache.obtain(settings.cache_dir / "texts", PACKAGE, fetch) / _NAME
