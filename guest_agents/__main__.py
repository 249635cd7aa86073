"""The agent of a blade: takes the blade's identity from the host, brings the fabric up, serves its monitors.

A template is saved while this program waits for an identity, with everything slow already imported, so that a
blade restored from it is ready in seconds. After a crash it finds its identity in a file and comes up by
itself.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from guest_agents import agent, identity, provision


def main() -> int:
    logging.basicConfig(force=True, stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    agent.preload()
    signal.signal(signal.SIGTERM, _end)
    known = identity.load()
    if known is not None:
        agent.Agent(known).start()
    provision.serve(agent.take_identity, identified=known is not None)
    return 0


def _end(_signal: int, _frame: object) -> None:
    """Nobody shall have to wait until this blade's silence is noticed."""
    agent.leave()
    os._exit(0)  # there is nothing to save, and threads and the native core would hold up an orderly end


if __name__ == "__main__":
    sys.exit(main())
