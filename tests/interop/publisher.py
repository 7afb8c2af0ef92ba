"""A publisher: one session over all brokers, from the document's sections "Sessions" and "TCP"."""

from __future__ import annotations

import random
import selectors
import threading
import time
from dataclasses import dataclass, field

import frames
from control import GLOBAL_ORDERS, STRONG, Control, Session
from frames import Frame
from journal import Entry, Journal, make_messages
from link import Disconnected, Link, Refused, open_publish, origin_of

# Silence of a broker that owes an answer, after which its batches go to others. It doubles until an Ack comes: the
# machine may be busy.
SILENCE_S, LONGEST_SILENCE_S = 1.5, 100.0
# Time between two attempts to connect.
AGAIN_S = 0.1
# Time between two batches.
PACE_S = 0.02
# Bytes that may wait for a socket before a connection gets no more batches.
BACKLOG_BYTES = 64 << 10
# Codes after which the client tries again.
TRANSIENT = {frames.POOL_EXHAUSTED, frames.UNAVAILABLE, frames.TOO_SLOW}


def fate(session: Session, lowest: int) -> str:
    """What the answer to `resume` says of a client whose lowest batch without an Ack is `lowest`.

    `goes on`, `gone`, or `lost`, if acknowledged batches are in the log no more.
    """
    if session.is_gone:
        return "gone"
    if session.topic.order in GLOBAL_ORDERS and session.next_sequence < lowest:
        return "lost"
    return "goes on"


@dataclass
class Wire:
    """A connection of the session, and the batches that it carries."""

    number: int
    broker: int
    link: Link
    # Time at which it came to owe an answer.
    owes_since: float
    is_ready: bool = False
    # Number of batches that it carried so far.
    sent: int = 0
    # Sequences without an Ack.
    carries: list[int] = field(default_factory=list)

    def owes(self) -> bool:
        """True while the broker owes an answer."""
        return not self.is_ready or bool(self.carries)


class Publisher:
    """Publishes batches over one session, and sends again what is not acknowledged.

    It also does mischief: it cuts its own connections, reopens its session, and withholds a batch for a while.
    """

    def __init__(self, control: Control, topic: str, journal: Journal, seed: str) -> None:
        self._control, self._topic, self.journal = control, topic, journal
        self._random = random.Random(seed)
        self._wires: dict[int, Wire] = {}
        self._wires_made = 0
        self._tried_at: dict[int, float] = {}
        self._silence_s: dict[int, float] = {}
        self._endpoints: dict[int, tuple[str, int]] = {}
        self._asked_at = 0.0
        # Batches without an Ack by sequence, in that order; and those that no connection carries now.
        self._pending: dict[int, Entry] = {}
        self._unsent: set[int] = set()
        # The batch that is withheld.
        self._withheld: int | None = None
        self._acked: dict[int, Entry] = {}
        self._begin_client()

    # --- Sessions -----------------------------------------------------------------------------------------------------

    def _begin_client(self) -> None:
        """Begins as a new client. Nobody knows what became of batches without an Ack."""
        session = None
        while session is None:
            session = self._open(self._random.randrange(1, 1 << 64))
        self._session = session
        self._pending, self._unsent, self._acked, self._withheld = {}, set(), {}, None
        self._next = self._session.next_sequence

    def _open(self, client_id: int, token: int = 0) -> Session | None:
        """Opens an epoch of a client that knows of no batch. None if somebody holds the id."""
        session = self._control.open_session(self._topic, client_id, self.journal.ack_level, token)
        if session is None:
            self.journal.turn("held")
        return session

    @property
    def _is_global(self) -> bool:
        return self._session.topic.order in GLOBAL_ORDERS

    def _lowest(self) -> int:
        """Lowest sequence without an Ack."""
        return min(self._pending, default=self._next)

    def reopen(self, why: str) -> None:
        """Opens the next epoch and goes on, as far as the brokers still know this client."""
        self.journal.turn(why)
        for wire in list(self._wires.values()):
            self._drop(wire)
        if self.journal.ack_level == 0:
            # It cannot know what came: it goes on with new batches.
            session = self._open(self._session.client_id, self._session.token)
            if session is None:
                # Its session was gone. An answer with the token of the next one was lost.
                self._begin_client()
                return
            self._session = session
            self._pending, self._unsent, self._withheld = {}, set(), None
            self._next = self._session.next_sequence if self._is_global else self._next
            return
        session = self._control.resume_session(self._session)
        outcome = fate(session, self._lowest())
        if outcome == "lost":
            self.journal.violations.append(
                f"{self.journal.publisher}: next_sequence is {session.next_sequence}, {self._lowest()} is acknowledged")
        if outcome != "goes on":
            self.journal.turn(outcome)
            self._begin_client()
            return
        self._session, self._withheld = session, None
        # Acks of what is committed come without being asked for again.
        self._unsent = {sequence for sequence in self._pending
                        if not self._is_global or sequence >= session.next_sequence}

    # --- Connections --------------------------------------------------------------------------------------------------

    def _drop(self, wire: Wire) -> None:
        """Closes a connection. Its batches are to be sent again."""
        wire.link.close()
        self._wires.pop(wire.broker, None)
        if self.journal.ack_level > 0:
            self._unsent.update(sequence for sequence in wire.carries if sequence in self._pending)

    def _connect(self) -> None:
        """Opens a connection to each live broker that has none."""
        now = time.monotonic()
        complete = self._endpoints and len(self._wires) == len(self._endpoints)
        if now - self._asked_at > (1.0 if complete else 3 * AGAIN_S):
            self._endpoints, self._asked_at = self._control.brokers(), now
        for broker, endpoint in self._endpoints.items():
            if broker in self._wires or now - self._tried_at.get(broker, 0) < AGAIN_S:
                continue
            self._tried_at[broker] = now
            try:
                link = Link(endpoint)
            except Disconnected:
                self._asked_at = 0
                continue
            self._wires_made += 1
            self._wires[broker] = Wire(self._wires_made, broker, link, now)
            link.send(open_publish(self._session, self._lowest()))

    def _receive(self) -> None:
        """Waits a moment for frames of any connection, and takes them."""
        with selectors.DefaultSelector() as selector:
            for wire in self._wires.values():
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wire.link.unsent else 0)
                selector.register(wire.link, events)
            selector.select(0.02)
        for wire in list(self._wires.values()):
            if self._wires.get(wire.broker) is not wire:
                continue
            try:
                wire.link.exchange()
                for frame, _ in wire.link.frames():
                    self._take(wire, frame)
            except Refused as refused:
                self._refused(wire, refused)
            except Disconnected:
                self._lost(wire)
            else:
                since = max(wire.link.heard_at, wire.owes_since)
                patience = self._silence_s.get(wire.broker, SILENCE_S)
                if wire.owes() and time.monotonic() - since > patience and self.journal.ack_level > 0:
                    self.journal.turn("silent")
                    self._silence_s[wire.broker] = min(2 * patience, LONGEST_SILENCE_S)
                    self._drop(wire)

    def _refused(self, wire: Wire, refused: Refused) -> None:
        if refused.code == frames.UNKNOWN_SESSION:
            if self._wires.get(wire.broker) is wire:
                self.reopen("ended")
        elif refused.code in TRANSIENT:
            self.journal.turn("refused")
            self._lost(wire)
        else:
            self.journal.violations.append(f"{self.journal.publisher}: {refused}")
            self._lost(wire)

    def _lost(self, wire: Wire) -> None:
        self.journal.turn("disconnected")
        self._drop(wire)
        if self.journal.ack_level == 0:
            self.reopen("reopened")

    # --- Frames -------------------------------------------------------------------------------------------------------

    def _take(self, wire: Wire, frame: Frame) -> None:
        if frame.kind == frames.PUBLISH_READY:
            if wire.is_ready or frame.broker != wire.broker:
                self._wrong(f"PublishReady of broker {frame.broker} from broker {wire.broker}")
            wire.is_ready = True
        elif frame.kind == frames.ACK:
            self._silence_s.pop(wire.broker, None)
            self._acknowledge(wire, frame)
        elif frame.kind == frames.FENCED:
            if frame.session_epoch != self._session.epoch:
                self._wrong(f"Fenced names epoch {frame.session_epoch}, the session has {self._session.epoch}")
            if self._is_global and frame.committed > self._next:
                self._wrong(f"Fenced: {frame.committed} batches are committed, {self._next} were made")
            self.journal.turn("fenced")
        else:
            self._wrong(f"a publisher got a frame of kind {frame.kind}")

    def _wrong(self, text: str) -> None:
        self.journal.violations.append(f"{self.journal.publisher}: {text}")

    def _acknowledge(self, wire: Wire, ack: Frame) -> None:
        expected = frames.GLOBAL if self._is_global else wire.broker
        entry = self._pending.get(ack.sequence) or self._acked.get(ack.sequence)
        if entry is None or ack.session_epoch != self._session.epoch or ack.stream != expected:
            self._wrong(f"an Ack of nothing that was sent: {ack}")
            return
        if ack.committed > self._next:
            self._wrong(f"{ack.committed} batches are committed, {self._next} were made")
        if entry.acks:
            self.journal.turn("repeated")
        entry.acks.append((ack.stream, None if ack.first_offset == frames.UNKNOWN_OFFSET else ack.first_offset))
        if ack.sequence in wire.carries:
            wire.carries.remove(ack.sequence)
        self._unsent.discard(ack.sequence)
        if self._pending.pop(ack.sequence, None) is not None:
            self._acked[ack.sequence] = entry
        if len(self._acked) > 4 * self._session.window_batches:
            del self._acked[min(self._acked)]

    # --- Batches ------------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Makes a batch, if the window has room for it."""
        if self._next - self._lowest() >= self._session.window_batches and self.journal.ack_level > 0:
            return
        serial = len(self.journal.entries)
        count, filler = self._random.randint(1, 5), self._random.randint(0, 60)
        messages = make_messages(self.journal.publisher, serial, count, filler)
        entry = Entry(self.journal.publisher, serial, self._session.client_id, self._next, messages)
        self.journal.entries.append(entry)
        self._pending[self._next] = entry
        self._unsent.add(self._next)
        self._next += 1

    def _send(self) -> None:
        """Sends what no connection carries, over any that takes it."""
        for sequence in sorted(self._unsent):
            wires = [wire for wire in self._wires.values() if wire.is_ready and wire.link.unsent < BACKLOG_BYTES]
            if not wires:
                return
            if sequence == self._withheld:
                continue
            wire, entry = self._random.choice(wires), self._pending[sequence]
            if not wire.carries:
                wire.owes_since = time.monotonic()
            self._unsent.remove(sequence)
            entry.sent.append((wire.number, wire.sent))
            wire.sent += 1
            wire.link.send(frames.encode_batch(origin_of(self._session), sequence, entry.messages))
            if self.journal.ack_level > 0:
                wire.carries.append(sequence)
            else:
                del self._pending[sequence]

    # --- Mischief -----------------------------------------------------------------------------------------------------

    def _mischief(self) -> None:
        """Does what a client may do to itself."""
        chance = self._random.random()
        if chance < 0.01 and self._wires:
            wire = self._random.choice(list(self._wires.values()))
            self.journal.turn("cut")
            if wire.is_ready and self._pending and self.journal.ack_level > 0:
                # In mid-batch.
                entry = self._random.choice(list(self._pending.values()))
                batch = frames.encode_batch(origin_of(self._session), entry.sequence, entry.messages)
                wire.link.send(batch[:self._random.randrange(1, len(batch))])
            self._lost(wire)
        elif chance < 0.015:
            self.reopen("reopened")
        elif chance < 0.02 and self._withheld is None and self._unsent and self.journal.ack_level > 0:
            self._withheld = min(self._unsent)
            self.journal.turn("withheld")
        elif chance < 0.06 and not self._blocks():
            self._withheld = None

    def _blocks(self) -> bool:
        """True while a batch is to be withheld on: in order `strong`, until the brokers fence the session."""
        return self._session.topic.order == STRONG and self._withheld is not None

    # --- The loop -----------------------------------------------------------------------------------------------------

    def step(self, with_mischief: bool) -> None:
        """One turn: connects, sends, receives."""
        if with_mischief:
            self._mischief()
        else:
            self._withheld = None
        self._connect()
        self._send()
        self._receive()

    def is_drained(self) -> bool:
        """True once every batch has its Ack, or at level 0 left this process."""
        waiting = any(wire.link.unsent for wire in self._wires.values())
        return not self._pending and not waiting

    def close(self) -> None:
        """Ends the connections. At levels above 0, where all is acknowledged, the session ends too."""
        for wire in list(self._wires.values()):
            self._drop(wire)
        if self.journal.ack_level > 0:
            self._control.close_session(self._session)


def publish(publisher: Publisher, calm: threading.Event, stop: threading.Event, more: int, is_seen: object) -> None:
    """Publishes until `calm`, then `more` batches, and returns once all are acknowledged.

    Level 0 has no Acks: it goes on until `is_seen` says that one of those batches was read.
    """
    journal, end, seen_from, due = publisher.journal, None, 0, time.monotonic()
    while not stop.is_set():
        if calm.is_set() and end is None:
            seen_from = len(journal.entries)
            end = seen_from + more
        wants_more = end is None or len(journal.entries) < end
        if not wants_more and publisher.is_drained():
            if journal.ack_level > 0 or is_seen(journal.publisher, seen_from):
                break
            wants_more = True
        if wants_more and time.monotonic() >= due:
            publisher.make()
            due = time.monotonic() + PACE_S
        publisher.step(with_mischief=end is None)
    publisher.close()
