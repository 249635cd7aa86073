"""The verbs constants under one name, whichever pyverbs there is.

pyverbs up to 58 has them in `pyverbs.enums`, later releases in `pyverbs.libibverbs_enums`
(lite-and-hotpot.md, section 7.3).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def _module() -> Any:
    try:
        return import_module("pyverbs.enums")
    except ModuleNotFoundError:
        return import_module("pyverbs.libibverbs_enums")


E: Any = _module()
