"""Frames and batches of the data plane, as docs/reference/protocol.md describes them ("Frames", "Batches")."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

MAGIC = b"EMBF"
VERSION = 3
FRAME_BYTES = 64
# An offset that is not known any more.
UNKNOWN_OFFSET = (1 << 64) - 1
# The stream of a topic's global order.
GLOBAL = (1 << 32) - 1
# The only flag: kind 3 has the CRC32C of its body.
BODY_CHECKSUM = 1

(OPEN_PUBLISH, PUBLISH_READY, BATCH_HEADER, ACK, FENCED, SUBSCRIBE, SUBSCRIBE_READY, DELIVER, ERROR_FRAME,
 POSITION, RDMA_CONNECT, RDMA_ACCEPT, WINDOW_GRANT) = range(1, 14)

(BAD_FRAME, UNKNOWN_TOPIC, UNKNOWN_SESSION, BAD_BATCH, POOL_EXHAUSTED, OFFSET_OUT_OF_RANGE, TOPIC_DELETED, ACK_LEVEL,
 CORRUPT, UNAVAILABLE, TOO_SLOW, NO_TRANSPORT, NOT_REPLICATED) = range(1, 14)

# Kinds of start of a Subscribe frame.
AT_OFFSET, EARLIEST, LATEST, AT_TIME = range(4)

# Fields of each kind, and their offsets.
FIELDS: dict[int, dict[str, int]] = {
    OPEN_PUBLISH: {"client_id": 8, "resume_from": 16, "session_epoch": 24, "session_slot": 28, "topic": 32,
                   "topic_incarnation": 36, "ack_level": 40, "token": 48},
    PUBLISH_READY: {"committed": 8, "max_batch_bytes": 16, "window_batches": 24, "broker": 28},
    BATCH_HEADER: {"client_id": 8, "sequence": 16, "session_epoch": 24, "payload_bytes": 28, "message_count": 32,
                   "body_checksum": 36, "topic": 40, "topic_incarnation": 44, "session_slot": 48},
    ACK: {"sequence": 8, "first_offset": 16, "committed": 24, "session_epoch": 32, "stream": 36},
    FENCED: {"committed": 8, "session_epoch": 16},
    SUBSCRIBE: {"start": 8, "start_kind": 16, "topic": 20, "topic_incarnation": 24, "stream": 28},
    SUBSCRIBE_READY: {"start_offset": 8, "next_offset": 16},
    DELIVER: {"first_offset": 8, "ordered_us": 16, "batch_bytes": 24, "message_count": 28, "broker": 32, "stream": 36,
              "client_id": 40, "sequence": 48},
    ERROR_FRAME: {"code": 8, "text_bytes": 12, "detail": 16},
    POSITION: {"next_offset": 8},
    RDMA_CONNECT: {"gid": 8, "queue_pair": 24, "first_psn": 28, "mtu": 32, "lid": 36, "ring_address": 40,
                   "ring_bytes": 48, "ring_rkey": 52, "batch_bytes": 56},
    RDMA_ACCEPT: {"gid": 8, "queue_pair": 24, "first_psn": 28, "mtu": 32, "lid": 36},
    WINDOW_GRANT: {"address": 8, "number": 16, "rkey": 20, "bytes": 24},
}
# Fields of 8 bytes. `gid` has 16, `batch_bytes` and all others have 4.
WIDE = {"client_id", "sequence", "resume_from", "committed", "max_batch_bytes", "first_offset", "start",
        "start_offset", "next_offset", "ordered_us", "detail", "address", "ring_address", "token"}


class Malformed(Exception):
    """Bytes that no peer of this version sends."""


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC of `data`."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def width(name: str) -> int:
    """Bytes of a field."""
    return 16 if name == "gid" else 8 if name in WIDE else 4


@dataclass(frozen=True)
class Frame:
    """A frame. Its fields are attributes."""

    kind: int
    fields: dict[str, int]
    flags: int = 0

    def __getattr__(self, name: str) -> int:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(name) from None


def encode(kind: int, flags: int = 0, **fields: int) -> bytes:
    """The 64 bytes of a frame. Fields that are not given are zero."""
    data = bytearray(FRAME_BYTES)
    struct.pack_into("<4sBBH", data, 0, MAGIC, kind, VERSION, flags)
    for name, value in fields.items():
        offset, bytes_ = FIELDS[kind][name], width(name)
        data[offset:offset + bytes_] = value.to_bytes(bytes_, "little")
    struct.pack_into("<I", data, 60, crc32c(data[:60]))
    return bytes(data)


def decode(data: bytes) -> Frame:
    """Checks and decodes 64 bytes. Raises `Malformed` for what a receiver must refuse."""
    magic, kind, version, flags = struct.unpack_from("<4sBBH", data)
    if magic != MAGIC or version != VERSION:
        raise Malformed(f"magic {magic!r}, version {version}")
    if crc32c(data[:60]) != struct.unpack_from("<I", data, 60)[0]:
        raise Malformed(f"checksum of a frame of kind {kind}")
    if kind not in FIELDS:
        raise Malformed(f"kind {kind}")
    if flags & ~(BODY_CHECKSUM if kind == BATCH_HEADER else 0):
        raise Malformed(f"flags {flags:#x} of kind {kind}")
    used, fields = bytearray(data[8:60]), {}
    for name, offset in FIELDS[kind].items():
        end = offset + width(name)
        fields[name] = int.from_bytes(data[offset:end], "little")
        used[offset - 8:end - 8] = bytes(end - offset)
    if any(used):
        raise Malformed(f"a reserved byte of kind {kind} is not zero")
    return Frame(kind, fields, flags)


# --- Batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """The session that a batch names: the fields that OpenPublish and BatchHeader share."""

    client_id: int
    session_epoch: int
    session_slot: int
    topic: int
    topic_incarnation: int

    def fields(self) -> dict[str, int]:
        return vars(self).copy()


@dataclass(frozen=True)
class Batch:
    """A batch that was received, and checked."""

    header: Frame
    messages: list[bytes] = field(repr=False)


def encode_body(messages: list[bytes]) -> bytes:
    """Messages, padding and table of lengths."""
    payload = b"".join(messages)
    return payload + bytes(-len(payload) % 4) + b"".join(struct.pack("<I", len(message)) for message in messages)


def encode_batch(origin: Origin, sequence: int, messages: list[bytes]) -> bytes:
    """A whole batch: header and body."""
    body = encode_body(messages)
    header = encode(BATCH_HEADER, BODY_CHECKSUM, sequence=sequence, payload_bytes=sum(map(len, messages)),
                    message_count=len(messages), body_checksum=crc32c(body), **origin.fields())
    return header + body


def decode_batch(data: bytes) -> Batch:
    """Checks and decodes a batch. Raises `Malformed` if its body is not what its header says."""
    header, body = decode(data[:FRAME_BYTES]), data[FRAME_BYTES:]
    if header.kind != BATCH_HEADER:
        raise Malformed(f"a batch begins with kind {header.kind}")
    padded = header.payload_bytes + -header.payload_bytes % 4
    if len(body) != padded + 4 * header.message_count:
        raise Malformed(f"the body has {len(body)} bytes, which is not what the header says")
    if any(body[header.payload_bytes:padded]):
        raise Malformed("padding is not zero")
    if header.flags & BODY_CHECKSUM and crc32c(body) != header.body_checksum:
        raise Malformed("checksum of a body")
    lengths = struct.unpack_from(f"<{header.message_count}I", body, padded)
    if sum(lengths) != header.payload_bytes:
        raise Malformed("the lengths do not add up")
    messages, at = [], 0
    for length in lengths:
        messages.append(body[at:at + length])
        at += length
    return Batch(header, messages)
