"""Settings of all tests."""

from __future__ import annotations

import signal

# A shell's background jobs ignore Ctrl-C, and so would every program that the tests start from one and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
