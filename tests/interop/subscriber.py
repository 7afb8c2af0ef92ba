"""A subscriber, from the document's section "Subscriptions"."""

from __future__ import annotations

import random
import time
from typing import Any

import frames
from control import Control
from frames import Frame, Malformed
from journal import Delivered, Reading
from link import Disconnected, Link, Refused, subscribe

# Silence after which a broker is asked for a sign of life, and the wait for its answer. That doubles until something is
# delivered: the machine may be busy.
SILENCE_S, ANSWER_S, LONGEST_ANSWER_S = 1.0, 2.0, 100.0
# Time between two attempts to connect.
AGAIN_S = 0.1
# Codes after which the client tries again.
TRANSIENT = {frames.UNAVAILABLE, frames.TOO_SLOW, frames.POOL_EXHAUSTED}


class Subscriber:
    """Reads one stream of a topic, from one broker after the other, into a `Reading`."""

    def __init__(self, control: Control, topic: Any, reading: Reading, start_kind: int, start: int, seed: str) -> None:
        self._control, self._topic, self.reading = control, topic, reading
        self._start = (start_kind, start)
        self._random = random.Random(seed)
        self._link: Link | None = None
        self._is_ready = self._has_begun = False
        self._broker: int | None = None
        self._asked_at: float | None = None
        self._tried_at, self._answer_s = 0.0, ANSWER_S
        # Offset of the batch that was wrong when it was read first.
        self._doubtful: int | None = None
        # Offset after the last committed message, as far as any broker told.
        self.known_end = 0

    # --- Connections --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the connection. The next `poll` makes another, to another broker if the stream has more than one."""
        if self._link:
            self._link.close()
        self._link, self._is_ready, self._asked_at = None, False, None

    def hop(self) -> None:
        """Forgets some messages of the last batch and goes to another broker, which begins with that batch."""
        self.close()
        messages = self.reading.messages
        if messages:
            first = messages[-1].first_offset
            within = self.reading.end - max(first, self.reading.start)
            if (back := self._random.randint(0, within - 1)) > 0:
                del messages[-back:]
                self.reading.turn("half")
        self.reading.turn("hop")

    def _connect(self) -> None:
        if time.monotonic() - self._tried_at < AGAIN_S:
            time.sleep(AGAIN_S)
        self._tried_at = time.monotonic()
        brokers = self._control.brokers()
        if self.reading.stream == frames.GLOBAL:
            choice = [broker for broker in brokers if broker != self._broker] or list(brokers)
        else:
            choice = [broker for broker in brokers if broker == self.reading.stream]
        if not choice:
            return
        self._broker = self._random.choice(choice)
        try:
            self._link = Link(brokers[self._broker])
        except Disconnected:
            return
        kind, start = (frames.AT_OFFSET, self.reading.end) if self._has_begun else self._start
        self._link.send(subscribe(self._topic, self.reading.stream, kind, start))

    def poll(self, wait_s: float = 0.05) -> None:
        """Waits a moment for messages, and adds them to the reading."""
        if self._link is None:
            self._connect()
        link = self._link
        if link is None:
            return
        try:
            link.pump(wait_s)
            for frame, rest in link.frames():
                self._take(frame, rest)
            self._ask_if_silent(link)
        except Refused as refused:
            self._refused(refused)
            self.close()
        except Disconnected:
            self.reading.turn("disconnected")
            self.close()

    def _ask_if_silent(self, link: Link) -> None:
        now = time.monotonic()
        if self._asked_at is None and now - link.heard_at > SILENCE_S:
            if self._is_ready:
                link.send(frames.encode(frames.POSITION))
            self._asked_at = now
        elif self._asked_at is not None and now - self._asked_at > self._answer_s:
            self.reading.turn("silent")
            self._answer_s = min(2 * self._answer_s, LONGEST_ANSWER_S)
            self.close()

    def _refused(self, refused: Refused) -> None:
        if refused.code not in TRANSIENT:
            self._wrong(f"at {self.reading.end} of {self._start}, broker {self._broker}: {refused}")
        self.reading.turn("refused")

    def _wrong(self, text: str) -> None:
        self.reading.violations.append(f"{self.reading.reader}: {text}")

    # --- Frames -------------------------------------------------------------------------------------------------------

    def _take(self, frame: Frame, rest: bytes) -> None:
        self._asked_at = None
        if frame.kind == frames.SUBSCRIBE_READY and not self._is_ready:
            self._begin(frame)
        elif frame.kind == frames.POSITION:
            self._know(frame.next_offset)
        elif frame.kind == frames.DELIVER and self._is_ready:
            self._deliver(frame, rest)
        else:
            self._wrong(f"a subscriber got {frame}")
            raise Disconnected(f"a frame of kind {frame.kind}")

    def _know(self, next_offset: int) -> None:
        if next_offset < self.reading.end:
            self._wrong(f"the end is {next_offset}, {self.reading.end} messages were delivered")
        self.known_end = max(self.known_end, next_offset)

    def _begin(self, ready: Frame) -> None:
        self._is_ready = True
        kind, start = self._start
        if not self._has_begun:
            self._has_begun = True
            self.reading.start = ready.start_offset
            if kind == frames.AT_OFFSET and ready.start_offset != start:
                self._wrong(f"asked for {start}, the broker begins at {ready.start_offset}")
            if kind == frames.LATEST and ready.start_offset != ready.next_offset:
                self._wrong(f"the latest is {ready.next_offset}, the broker begins at {ready.start_offset}")
        elif ready.start_offset != self.reading.end:
            self._wrong(f"asked for {self.reading.end}, the broker begins at {ready.start_offset}")
        self._know(ready.next_offset)

    def _deliver(self, deliver: Frame, data: bytes) -> None:
        first, end = deliver.first_offset, deliver.first_offset + deliver.message_count
        due = self.reading.end
        if not first <= due < end or deliver.stream != self.reading.stream:
            self._wrong(f"{due} is due, and {deliver} came")
            raise Disconnected("the stream has a gap")
        try:
            messages = self._open(deliver, data)
        except Malformed as error:
            self._damaged(first, end, error)
            return
        batch = (first, deliver.client_id, deliver.sequence, deliver.broker, deliver.ordered_us)
        self.reading.messages.extend(Delivered(message, *batch) for message in messages[due - first:])
        self.known_end, self._answer_s = max(self.known_end, end), ANSWER_S

    def _open(self, deliver: Frame, data: bytes) -> list[bytes]:
        """Checks a batch against its Deliver frame and the topic."""
        batch = frames.decode_batch(data)
        header = batch.header
        told = (deliver.client_id, deliver.sequence, deliver.message_count, self._topic.id, self._topic.incarnation)
        if told != (header.client_id, header.sequence, header.message_count, header.topic, header.topic_incarnation):
            raise Malformed(f"{deliver} has the batch {header}")
        return batch.messages

    def _damaged(self, first: int, end: int, error: Malformed) -> None:
        """Reads a batch that is wrong once more, at another broker. One that is wrong twice is damaged."""
        if self._doubtful == first:
            self._wrong(f"the batch of offsets {first} to {end - 1} is damaged: {error}")
            nothing = Delivered(b"", first, 0, 0, 0, 0)
            self.reading.messages.extend([nothing] * (end - self.reading.end))
            return
        self._doubtful = first
        self.reading.turn("read again")
        raise Disconnected(str(error))
