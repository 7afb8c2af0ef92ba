"""What publishers sent and heard, and what readers read: the material that checker.py judges."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Entry:
    """A batch that a publisher made."""

    publisher: str
    serial: int
    client_id: int
    sequence: int
    messages: list[bytes] = field(repr=False)
    # Each time that it was sent: number of the connection, and of the batch among those that the connection carried.
    sent: list[tuple[int, int]] = field(default_factory=list)
    # Stream and first offset of each Ack; the offset is None if it was not known any more.
    acks: list[tuple[int, int | None]] = field(default_factory=list)


@dataclass
class Journal:
    """One publisher's batches. Its thread writes it."""

    publisher: str
    ack_level: int
    entries: list[Entry] = field(default_factory=list)
    # Statements of the brokers that contradict the document.
    violations: list[str] = field(default_factory=list)
    # How often it met each turn of the protocol: reopened, fenced, gone, repeated, ...
    turns: dict[str, int] = field(default_factory=dict)

    def turn(self, name: str) -> None:
        """Counts a turn of the protocol."""
        self.turns[name] = self.turns.get(name, 0) + 1


@dataclass(frozen=True)
class Delivered:
    """A message that was read, and the batch that it came in."""

    message: bytes = field(repr=False)
    first_offset: int
    client_id: int
    sequence: int
    broker: int
    ordered_us: int


@dataclass
class Reading:
    """Messages that one reader read of a stream, without a gap from `start` on."""

    reader: str
    stream: int
    start: int = 0
    messages: list[Delivered] = field(default_factory=list, repr=False)
    violations: list[str] = field(default_factory=list)
    turns: dict[str, int] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Offset after the last message."""
        return self.start + len(self.messages)

    def turn(self, name: str) -> None:
        """Counts a turn of the protocol."""
        self.turns[name] = self.turns.get(name, 0) + 1


def make_messages(publisher: str, serial: int, count: int, filler: int) -> list[bytes]:
    """Messages that name their batch, and are like no others."""
    return [f"{publisher}:{serial}:{index}:".encode() + b"x" * (filler * index) for index in range(count)]


def parse_message(message: bytes) -> tuple[str, int, int]:
    """Publisher, serial and index of a message."""
    publisher, serial, index, _ = message.decode().split(":", 3)
    return publisher, int(serial), int(index)
