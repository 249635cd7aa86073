"""`rackless demo`: the main job, end to end, on real input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.common import JsonOption, RackOption, current_rack

COUNT_WORDS = """{ $0 = tolower($0); gsub(/[^a-z]+/, " "); for (i = 1; i <= NF; i++) count[$i]++ }
END { for (word in count) print count[word], word }"""


def register(app: typer.Typer) -> None:
    """Add the command to the main app."""
    app.command()(demo)


def demo(
    text_size: Annotated[str, typer.Option("--text", metavar="SIZE", help="How much of the text.")] = "2 MiB",
    excache: Annotated[str, typer.Option(metavar="SIZE", help="Local memory of the program.")] = "8 MiB",
    rack: RackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count the words of an English text on the rack.

    gawk runs on a processor blade, its memory is on memory blades, the file on a storage blade. Without KVM,
    `--text "20 MiB" --excache "16 MiB"` takes some five minutes: a word that was not seen for a while is a miss.
    """
    from orchestrator.corpus import english
    from orchestrator.errors import RacklessError
    from orchestrator.events import step
    from orchestrator.ssh import client
    from orchestrator.ui import progress
    from orchestrator.units import parse_size

    try:
        text_bytes = parse_size(text_size)
    except ValueError as error:
        raise RacklessError(f"--text: {error}") from None
    current = current_rack(rack)
    current.must_be_up()
    blades = current.running()
    processor = next((name for name, spec in blades.items() if spec.kind == "processor"), None)
    storage = next((name for name, spec in blades.items() if spec.kind == "storage"), None)
    if not processor or not storage:
        raise RacklessError("the demo needs a processor and a storage blade", hint="see racks/default.yml")
    with (
        progress(current.name, as_json) as emit,
        tempfile.TemporaryDirectory(prefix="rackless-demo-") as folder,
    ):
        work = Path(folder)
        with step(emit, current.name, "text"):
            with english(current.paths.settings).open("rb") as source:
                text = source.read(text_bytes)
            (work / "english.txt").write_bytes(text)
        with (
            step(emit, current.name, "copy", storage),
            client.connect(current.paths, storage, blades[storage].mgmt_address) as connection,
        ):
            connection.put(str(work / "english.txt"), "/vnode/english.txt")
        with step(emit, current.name, "gawk", processor), (work / "counts").open("wb") as output:
            started = time.monotonic()
            command = [sys.executable, "-m", "orchestrator.cli.main", "run", "--rack", current.name, "--on", processor,
                       "--excache", excache, "--stats", str(work / "stats.json"),
                       "--", "env", "LC_ALL=C", "gawk", COUNT_WORDS, "english.txt"]  # fmt: skip
            code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, check=False).returncode
            seconds = time.monotonic() - started
        if code:
            raise RacklessError(
                f"gawk on {processor} ended with exit code {code}", hint=f"see `rackless logs {processor}`"
            )
        with step(emit, current.name, "check"):
            same = _counts(work / "counts") == _count_here(text)
        stats = json.loads((work / "stats.json").read_text())
    result = {"words": len(_count_here(text)), "text_bytes": len(text), "seconds": round(seconds, 1), "identical": same,
              "stats": stats}  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        print(f"gawk on {processor} found {result['words']} different words in {len(text) >> 20} MiB of English in "
              f"{seconds:.1f} s with {excache} of local memory;\nthe rest of its memory was on memory blades: "
              f"{stats['misses']} misses, {stats['flushes']} pages went out, {stats['zero_fills']} were zero-filled;\n"
              f"{stats['packed_hits']} times a page was only packed, in {stats['pool_bytes'] / 2**20:.1f} MiB of it.\n"
              f"Its output {'equals' if same else 'DIFFERS FROM'} that of a count on this host.")  # fmt: skip
    if not same:
        sys.exit(1)


def _count_here(text: bytes) -> Counter[bytes]:
    return Counter(re.findall(rb"[a-z]+", text.lower()))


def _counts(path: Path) -> Counter[bytes]:
    lines = (line.split(b" ", 1) for line in path.read_bytes().splitlines())
    return Counter({word: int(count) for count, word in lines})
