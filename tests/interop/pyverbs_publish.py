#!/usr/bin/python3
"""Publishes one batch over verbs, with none of the project's code: pyverbs (python3-pyverbs), grpcio (python3-grpcio).

Written from docs/reference/protocol.md.   pyverbs_publish.py CONTROL TOPIC MESSAGE...
Prints the offset of the first message, as the acknowledgement names it.
"""

import ipaddress
import random
import socket
import struct
import sys
import time

import grpc
from pyverbs.addr import AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context, get_device_list
import pyverbs.enums as e
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import RecvWR, SGE, SendWR

VERSION = 3
PATIENCE = 300
FRAMES = 64


# --- CRC32C and frames -------------------------------------------------------------------------------------------------

def crc32c(data):
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def frame(kind, flags=0, **fields):
    """A frame of 64 bytes; a field is NAME=(offset, format, value)."""
    data = bytearray(64)
    struct.pack_into("<4sBBH", data, 0, b"EMBF", kind, VERSION, flags)
    for offset, form, value in fields.values():
        struct.pack_into("<" + form, data, offset, value)
    struct.pack_into("<I", data, 60, crc32c(data[:60]))
    return bytes(data)


def check(data):
    magic, kind, version = struct.unpack_from("<4sBB", data)
    assert (magic, version) == (b"EMBF", VERSION), data
    assert crc32c(data[:60]) == struct.unpack_from("<I", data, 60)[0], "checksum"
    return kind


# --- Control plane: protobuf by hand over gRPC ---------------------------------------------------------------------------

def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def encode(**fields):
    """NAME=(number, value) of integers and strings."""
    out = b""
    for number, value in fields.values():
        if isinstance(value, str):
            out += varint(number << 3 | 2) + varint(len(value)) + value.encode()
        else:
            out += varint(number << 3) + varint(value)
    return out


def decode(data):
    """Field number -> list of integers or bytes. Integers are varints, or fixed64."""
    fields, at = {}, 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 0:
            value = number()
        elif key & 7 == 1:
            value, at = struct.unpack_from("<Q", data, at)[0], at + 8
        else:
            length = number()
            value, at = data[at:at + length], at + length
        fields.setdefault(key >> 3, []).append(value)
    return fields


def call(endpoint, method, request):
    with grpc.insecure_channel(endpoint) as channel:
        stub = channel.unary_unary("/embarcadero.control.v1.Control/" + method)
        return decode(stub(request, timeout=PATIENCE))


# --- The data path -------------------------------------------------------------------------------------------------------

def open_device():
    """The first device whose port is up, and the index of its RoCE v2 address over IPv4."""
    for device in get_device_list():
        context = Context(name=device.name.decode())
        port = context.query_port(1)
        for index in range(port.gid_tbl_len if port.state == e.IBV_PORT_ACTIVE else 0):
            try:
                entry = context.query_gid_ex(1, index)
            except Exception:
                break
            address = ipaddress.IPv6Address(context.query_gid(1, index).gid)
            if entry.gid_type == e.IBV_GID_TYPE_ROCE_V2 and address.ipv4_mapped:
                return context, index, address.packed
    raise SystemExit("no device with a RoCE v2 address over IPv4")


def read_exactly(sock, count):
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        assert more, "the broker closed the connection"
        data += more
    return data


def main():
    control, topic_name, messages = sys.argv[1], sys.argv[2], [text.encode() for text in sys.argv[3:]]
    client_id = random.randrange(1, 1 << 63)

    metadata = call(control, "Metadata", b"")
    brokers = [decode(broker) for broker in metadata[2]]
    head = next(broker for broker in brokers if broker.get(5) == [1])
    host, port = head[3][0].decode().rsplit(":", 1)
    session = call(head[4][0].decode(), "OpenSession",
                   encode(topic=(1, topic_name), client_id=(2, client_id), ack_level=(3, 1)))
    topic = decode(session[1][0])

    def first(fields, number):
        return fields.get(number, [0])[0]  # protobuf leaves out zeros

    slot, epoch, sequence = (first(session, number) for number in (2, 3, 4))
    token = first(session, 7)
    topic_id, incarnation = first(topic, 1), first(topic, 2)

    # The batch: header, messages, zeros up to a multiple of 4, lengths.
    body = b"".join(messages)
    payload_bytes = len(body)
    body += bytes(-len(body) % 4) + b"".join(struct.pack("<I", len(message)) for message in messages)
    batch = frame(3, flags=1, client_id=(8, "Q", client_id), sequence=(16, "Q", sequence), epoch=(24, "I", epoch),
                  payload_bytes=(28, "I", payload_bytes), message_count=(32, "I", len(messages)),
                  body_checksum=(36, "I", crc32c(body)), topic=(40, "I", topic_id),
                  topic_incarnation=(44, "I", incarnation), slot=(48, "I", slot)) + body

    context, gid_index, gid = open_device()
    pd = PD(context)
    cq = CQ(context, 128)
    capacity = QPCap(max_send_wr=8, max_recv_wr=FRAMES, max_send_sge=1, max_recv_sge=1)
    qp = QP(pd, QPInitAttr(qp_type=e.IBV_QPT_RC, scq=cq, rcq=cq, cap=capacity), QPAttr(port_num=1))
    inbox = MR(pd, FRAMES * 64, e.IBV_ACCESS_LOCAL_WRITE)
    outbox = MR(pd, max(len(batch), 4096), e.IBV_ACCESS_LOCAL_WRITE)
    outbox.write(batch, len(batch))

    sock = socket.create_connection((host, int(port)), PATIENCE)
    psn = random.randrange(1 << 24)
    sock.sendall(frame(11, gid=(8, "16s", gid), queue_pair=(24, "I", qp.qp_num), first_psn=(28, "I", psn),
                       mtu=(32, "I", 4096), batch_bytes=(56, "I", len(batch))))
    answer = read_exactly(sock, 64)
    assert check(answer) == 12, f"no RdmaAccept but kind {answer[4]}"
    peer_gid = answer[8:24]
    peer_qpn, peer_psn, peer_mtu = struct.unpack_from("<III", answer, 24)

    route = GlobalRoute(dgid=_gid(peer_gid), sgid_index=gid_index, hop_limit=64)
    attr = QPAttr(port_num=1)
    attr.qp_access_flags = 0
    attr.dest_qp_num, attr.rq_psn, attr.sq_psn = peer_qpn, peer_psn, psn
    attr.path_mtu = min(4096, peer_mtu).bit_length() - 8
    attr.ah_attr = AHAttr(gr=route, is_global=1, port_num=1)
    attr.min_rnr_timer, attr.timeout, attr.retry_cnt, attr.rnr_retry = 12, 20, 7, 7
    qp.to_init(attr)
    for index in range(FRAMES):
        qp.post_recv(RecvWR(wr_id=index, num_sge=1, sg=[SGE(inbox.buf + 64 * index, 64, inbox.lkey)]))
    qp.to_rtr(attr)
    qp.to_rts(attr)
    sock.sendall(frame(1, client_id=(8, "Q", client_id), resume_from=(16, "Q", sequence), epoch=(24, "I", epoch),
                       slot=(28, "I", slot), topic=(32, "I", topic_id), topic_incarnation=(36, "I", incarnation),
                       ack_level=(40, "I", 1), token=(48, "Q", token)))

    # "I have a batch and no window": a WRITE of no bytes.
    nothing = SGE(outbox.buf, 0, outbox.lkey)
    wants = SendWR(wr_id=0, opcode=e.IBV_WR_RDMA_WRITE_WITH_IMM, num_sge=1, imm_data=socket.htonl(1 << 31),
                   sg=[nothing], send_flags=e.IBV_SEND_SIGNALED)
    wants.set_wr_rdma(0, 0)
    qp.post_send(wants)
    written, begun = False, time.time()
    while time.time() - begun < PATIENCE:
        count, completions = cq.poll(16)
        for completion in completions[:count]:
            assert completion.status == e.IBV_WC_SUCCESS, f"status {completion.status}"
            if completion.opcode != e.IBV_WC_RECV:
                continue
            data = inbox.read(64, 64 * completion.wr_id)
            kind = check(data)
            if kind == 13 and not written:  # WindowGrant
                address, number, rkey, size = struct.unpack_from("<QIII", data, 8)
                assert len(batch) <= size
                write = SendWR(wr_id=1, opcode=e.IBV_WR_RDMA_WRITE_WITH_IMM, num_sge=1, imm_data=socket.htonl(number),
                               sg=[SGE(outbox.buf, len(batch), outbox.lkey)], send_flags=e.IBV_SEND_SIGNALED)
                write.set_wr_rdma(rkey, address)
                qp.post_send(write)
                written = True
            elif kind == 4:  # Ack
                acknowledged, offset = struct.unpack_from("<QQ", data, 8)
                assert acknowledged == sequence
                print(offset)
                return
    raise SystemExit("no acknowledgement")


def _gid(raw):
    from pyverbs.addr import GID
    return GID(str(ipaddress.IPv6Address(raw).exploded))


main()
