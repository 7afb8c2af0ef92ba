"""A data connection: frames in, bytes out, over a socket that never blocks."""

from __future__ import annotations

import selectors
import socket
import time
from typing import Iterator

import frames
from control import Session
from frames import FRAME_BYTES, Frame, Origin


class Disconnected(Exception):
    """The connection has ended, or cannot be made."""


class Refused(Disconnected):
    """The broker ended the connection with an ErrorFrame."""

    def __init__(self, frame: Frame, text: str) -> None:
        super().__init__(f"code {frame.code}: {text}")
        self.code, self.detail = frame.code, frame.detail


class Link:
    """A connection to a broker's data endpoint."""

    def __init__(self, endpoint: tuple[str, int], connect_s: float = 4.0) -> None:
        try:
            self._socket = socket.create_connection(endpoint, connect_s)
        except OSError as error:
            raise Disconnected(str(error)) from error
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._in, self._out = bytearray(), bytearray()
        self._failed: OSError | None = None
        # Time at which bytes came last.
        self.heard_at = time.monotonic()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent(self) -> int:
        """Bytes that wait for room in the socket."""
        return len(self._out)

    def send(self, data: bytes) -> None:
        """Sends bytes, or keeps them until `pump` can."""
        self._out += data
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[:self._socket.send(self._out)]
        except BlockingIOError:
            pass
        except OSError as error:
            # `frames` tells of it behind what came before, which may say why.
            self._out.clear()
            self._failed = error

    def pump(self, wait_s: float) -> None:
        """Waits for bytes or room, and sends and receives what it can."""
        with selectors.DefaultSelector() as selector:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
            selector.register(self._socket, events)
            selector.select(wait_s)
        self.exchange()

    def exchange(self) -> None:
        """Sends and receives what the socket takes and has now."""
        self._flush()
        try:
            while data := self._socket.recv(1 << 16):
                self._in += data
                self.heard_at = time.monotonic()
            self._failed = self._failed or ConnectionResetError("the broker closed the connection")
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed = error

    def frames(self) -> Iterator[tuple[Frame, bytes]]:
        """Frames that have come whole, each with the bytes that follow it.

        Raises `Refused` at an ErrorFrame, `Disconnected` behind the last frame of a connection that ended.
        """
        while len(self._in) >= FRAME_BYTES:
            frame = frames.decode(bytes(self._in[:FRAME_BYTES]))
            follows = {frames.DELIVER: "batch_bytes", frames.ERROR_FRAME: "text_bytes"}.get(frame.kind)
            end = FRAME_BYTES + (frame.fields[follows] if follows else 0)
            if len(self._in) < end:
                break
            rest = bytes(self._in[FRAME_BYTES:end])
            del self._in[:end]
            if frame.kind == frames.ERROR_FRAME:
                raise Refused(frame, rest.decode())
            yield frame, rest
        if self._failed:
            raise Disconnected(str(self._failed)) from self._failed


def origin_of(session: Session) -> Origin:
    """The fields with which frames name a session."""
    return Origin(session.client_id, session.epoch, session.slot, session.topic.id, session.topic.incarnation)


def open_publish(session: Session, resume_from: int) -> bytes:
    """The opening frame of a publisher."""
    return frames.encode(frames.OPEN_PUBLISH, resume_from=resume_from, ack_level=session.ack_level,
                         token=session.token, **origin_of(session).fields())


def subscribe(topic: object, stream: int, start_kind: int, start: int = 0) -> bytes:
    """The opening frame of a subscriber."""
    return frames.encode(frames.SUBSCRIBE, start=start, start_kind=start_kind, topic=topic.id,
                         topic_incarnation=topic.incarnation, stream=stream)
