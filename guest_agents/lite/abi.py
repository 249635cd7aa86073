"""The C interface of the native core of LITE (native/lite/core.h), as ctypes has it: structures, calls, the library."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).parents[1] / "native" / "build" / "lite_core.so"
MAX_QPS = 8
MAX_PEERS = 64


class Config(ctypes.Structure):
    _fields_ = (
        ("device", ctypes.c_char * 64),
        ("queue_pairs", ctypes.c_uint32),
        ("qos", ctypes.c_uint32),
        ("pool", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("buffers", ctypes.c_uint64),
        ("timeout_ms", ctypes.c_uint32),
        ("spin_us", ctypes.c_uint32),
    )


class Address(ctypes.Structure):
    _fields_ = (
        ("gid", ctypes.c_uint8 * 16),
        ("count", ctypes.c_uint32),
        ("heads_rkey", ctypes.c_uint32),
        ("heads", ctypes.c_uint64),
        ("qpn", ctypes.c_uint32 * MAX_QPS),
        ("psn", ctypes.c_uint32 * MAX_QPS),
    )


class Block(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("node", ctypes.c_uint32),
        ("rkey", ctypes.c_uint32),
    )


class Slab(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("rkey", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class Ring(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("max_message", ctypes.c_uint64),
        ("lost", ctypes.c_uint64),
        ("rkey", ctypes.c_uint32),
        ("generation", ctypes.c_uint32),
    )


class Event(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("node", ctypes.c_uint32),
        ("incarnation", ctypes.c_uint32),
        ("port", ctypes.c_uint32),
        ("client", ctypes.c_uint64),
    )


class PeerStats(ctypes.Structure):
    _fields_ = (
        ("node", ctypes.c_uint32),
        ("incarnation", ctypes.c_uint32),
        ("state", ctypes.c_uint32),
        ("queue_pairs", ctypes.c_uint32),
        ("in_flight", ctypes.c_uint64),
        ("waiting", ctypes.c_uint64),
        ("bytes_out", ctypes.c_uint64),
        ("bytes_in", ctypes.c_uint64),
    )


COUNTERS = (
    # since the start
    "reads", "writes", "atomics", "calls", "sends", "receives", "replies", "cancels", "errors",
    "bytes_read", "bytes_written", "bytes_local", "messages_in", "messages_dropped", "bad_requests", "bad_messages",
    "peers_broken", "parked", "ring_waits", "timeouts", "polls", "sleeps", "posts", "mails", "knocks",
    # now
    "clients", "channels", "lmrs", "handles", "buffers", "ports", "ops", "pieces", "rings_in", "rings_out",
    "descriptors", "slots_used", "slots_quarantined", "pool_used",
    "bytes_slabs", "bytes_buffers", "bytes_pool", "bytes_slots", "bytes_rings", "queue_pairs",
)  # fmt: skip


class Stats(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in COUNTERS),
        ("n_peers", ctypes.c_uint64),
        ("peers", PeerStats * MAX_PEERS),
    )


PEER_STATES = ("prepared", "connected", "broken")

_U32, _U64, _VOID = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "close": (),
    "join": (_U32, _U32),
    "slab_open": (_U64, _VOID),
    "slab_close": (_U64,),
    "peer_prepare": (_U32, _U32, _VOID),
    "peer_connect": (_U32, _U32, _VOID),
    "peer_dead": (_U32, _U32),
    "client_add": (_U32, _VOID),
    "channel_add": (_U64, ctypes.c_int, _VOID),
    "client_remove": (_U64,),
    "lmr_put": (_U64, _VOID, _U32),
    "lmr_freeze": (_U64, _U32),
    "lmr_replace": (_U64, _VOID, _U32),
    "lmr_thaw": (_U64,),
    "lmr_kill": (_U64, ctypes.c_int),
    "handle_add": (_U64, _U64, _U32, _VOID),
    "handle_set": (_U64, _U64, _U32),
    "handle_drop": (_U64, _U64),
    "buffer_add": (_U64, _U64, _VOID, _VOID),
    "buffer_drop": (_U64, _U32),
    "port_open": (_U64, _U32, _U64),
    "port_close": (_U64, _U32),
    "ring_offer": (_U32, _U32, _U32, _VOID),
    "ring_attach": (_U32, _U32, _U32, _VOID),
    "ring_refuse": (_U32, _U32, _U32, ctypes.c_int),
    "raw": (_U32, _U32, _U64, _U32, _VOID, _U64, _U64, _U64, _VOID),
    "qos_set": (_U32,),
    "stats": (_VOID,),
    "next_event": (_U32, _VOID),
}


def load() -> ctypes.CDLL:
    """The library, its calls typed. OSError when it is not built."""
    library = ctypes.CDLL(str(LIBRARY), use_errno=True)
    library.lite_open.argtypes = (_VOID, _VOID)
    library.lite_open.restype = ctypes.c_int
    for name, arguments in SIGNATURES.items():
        function = getattr(library, f"lite_{name}")
        function.argtypes = (_VOID, *arguments)
        function.restype = ctypes.c_int
    return library
