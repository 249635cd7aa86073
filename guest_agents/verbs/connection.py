"""Reliable connections: a queue pair from creation to ready, and posting to it.

The two sides exchange `Address` over the control channel, not RDMA-CM: many RDMA-CM connections have crashed rxe
(lite-and-hotpot.md, section 7.2).
"""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from pyverbs.addr import AHAttr, GlobalRoute
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

from guest_agents.verbs.arena import ATOMIC
from guest_agents.verbs.completion import Completions
from guest_agents.verbs.device import PORT, Device, parse_gid
from guest_agents.verbs.enums import E

READS_IN_FLIGHT = 16
ACK_TIMEOUT = 18
"""4.096 us << 18 = 1.07 s: an emulated blade may be silent that long without being dead."""
RETRIES = 6
"""A dead peer is noticed after about 7 s. 7 would mean for ever, for receiver-not-ready."""
RNR_TIMER = 12
"""0.64 ms until a sender tries again after receiver-not-ready."""
_SEND, _READ, _WRITE = int(E.IBV_WR_SEND), int(E.IBV_WR_RDMA_READ), int(E.IBV_WR_RDMA_WRITE)
_SIGNALED = int(E.IBV_SEND_SIGNALED)
_SOLICITED = int(E.IBV_SEND_SOLICITED)


@dataclass(frozen=True)
class Address:
    """What a peer must know to connect to a queue pair."""

    qpn: int
    psn: int
    gid: str

    def fields(self) -> dict[str, Any]:
        """For a control message."""
        return asdict(self)


def address_of(message: dict[str, Any]) -> Address:
    """The address in a control message."""
    return Address(int(message["qpn"]), int(message["psn"]), str(message["gid"]))


class Connection:
    """One RC queue pair.

    with_depth -- work requests each of the two queues holds.
    """

    def __init__(self, device: Device, completions: Completions, depth: int = 64) -> None:
        self._device = device
        cap = QPCap(max_send_wr=depth, max_recv_wr=depth, max_send_sge=1, max_recv_sge=1)
        init = QPInitAttr(qp_type=E.IBV_QPT_RC, scq=completions.cq, rcq=completions.cq, cap=cap, sq_sig_all=0)
        self._qp: Any = QP(device.pd, init)
        self._psn = secrets.randbits(24)
        self.address = Address(int(self._qp.qp_num), self._psn, device.gid)
        attributes = QPAttr(port_num=PORT)
        attributes.qp_access_flags = ATOMIC
        self._qp.to_init(attributes)

    def connect(self, peer: Address) -> None:
        """Make the queue pair ready to receive and to send."""
        attributes = QPAttr(port_num=PORT)
        attributes.path_mtu = self._device.mtu
        attributes.dest_qp_num = peer.qpn
        attributes.rq_psn = peer.psn
        attributes.max_dest_rd_atomic = READS_IN_FLIGHT
        attributes.min_rnr_timer = RNR_TIMER
        route = GlobalRoute(dgid=parse_gid(peer.gid), sgid_index=self._device.gid_index, hop_limit=64)
        attributes.ah_attr = AHAttr(gr=route, is_global=1, port_num=PORT)
        self._qp.to_rtr(attributes)
        attributes.sq_psn = self._psn
        attributes.timeout = ACK_TIMEOUT
        attributes.retry_cnt = RETRIES
        attributes.rnr_retry = RETRIES
        attributes.max_rd_atomic = READS_IN_FLIGHT
        self._qp.to_rts(attributes)

    def post_receive(self, wr_id: int, address: int, length: int, lkey: int) -> None:
        """Offer a buffer for one SEND of the peer."""
        self._qp.post_recv(_receive_request(wr_id, address, length, lkey))

    def post_send(
        self, wr_id: int, address: int, length: int, lkey: int, solicited: bool = False, signaled: bool = True
    ) -> None:
        """SEND one message.

        solicited -- wake a peer that only waits for such
        signaled -- have a completion for it; without one only if it fails. Some must be: they free what the others used
        """
        flags = (_SIGNALED if signaled else 0) | (_SOLICITED if solicited else 0)
        self._qp.post_send(_send_request(_SEND, wr_id, address, length, lkey, flags))

    def post_read(self, wr_id: int, address: int, length: int, lkey: int, remote: int, rkey: int) -> None:
        """RDMA READ `length` bytes at `remote` into `address`."""
        self._qp.post_send(_send_request(_READ, wr_id, address, length, lkey, _SIGNALED, remote, rkey))

    def post_write(self, wr_id: int, address: int, length: int, lkey: int, remote: int, rkey: int) -> None:
        """RDMA WRITE `length` bytes at `address` to `remote`."""
        self._qp.post_send(_send_request(_WRITE, wr_id, address, length, lkey, _SIGNALED, remote, rkey))

    def close(self) -> None:
        """Destroy the queue pair; what is in flight is lost."""
        self._qp.close()


# Posting copies a request, so one can be posted many times, and a channel's buffers make the same few again and again.
# Without KVM to make one costs a quarter of a millisecond, mostly pyverbs looking up a logger for each of its parts.


@lru_cache(maxsize=256)
def _receive_request(wr_id: int, address: int, length: int, lkey: int) -> Any:
    return RecvWR(wr_id=wr_id, num_sge=1, sg=[SGE(address, length, lkey)])


@lru_cache(maxsize=256)
def _send_request(
    opcode: int, wr_id: int, address: int, length: int, lkey: int, flags: int, remote: int = 0, rkey: int = 0
) -> Any:
    sge = SGE(address, length, lkey)
    request = SendWR(wr_id=wr_id, opcode=opcode, num_sge=1, sg=[sge], send_flags=flags)
    if rkey:
        request.set_wr_rdma(rkey, remote)
    return request
