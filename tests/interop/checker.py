"""The judge of a history: compares what publishers were told with what readers read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from frames import GLOBAL
from journal import Entry, Journal, Reading, parse_message


@dataclass
class History:
    """All that is known of one topic."""

    topic: str
    order: str
    journals: list[Journal]
    # Of each stream, one reading of all of it, and any others.
    whole: dict[int, Reading]
    others: list[Reading] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """A batch in the log."""

    stream: int
    first_offset: int
    entry: Entry


def judge(history: History) -> list[str]:
    """All violations of what the document promises, in words. None for a correct history."""
    readings = [*history.whole.values(), *history.others]
    violations = [text for part in (*history.journals, *readings) for text in part.violations]
    for reading in history.others:
        violations += disagreements(history.whole[reading.stream], reading)
    entries = {(entry.publisher, entry.serial): entry for journal in history.journals for entry in journal.entries}
    log: list[Found] = []
    for reading in history.whole.values():
        violations += collect(reading, entries, log)
    violations += acknowledged(history.journals, log)
    if history.order in ("strong", "total"):
        violations += once(log)
    else:
        violations += at_most_as_often_as_sent(log)
    if history.order == "strong":
        violations += in_session_order(log)
    if history.order == "broker":
        violations += in_order_of_arrival(log)
    return [f"topic {history.topic}: {text}" for text in violations]


def disagreements(whole: Reading, reading: Reading) -> list[str]:
    """Offsets at which a reading differs from that of the whole stream."""
    if reading.start < whole.start or reading.end > whole.end:
        return [f"{reading.reader} read {reading.start} to {reading.end}, {whole.reader} to {whole.end}"]
    same = whole.messages[reading.start - whole.start:]
    for index, (one, other) in enumerate(zip(reading.messages, same)):
        if one != other:
            return [f"at {reading.start + index} {reading.reader} read {one}, {whole.reader} {other}"]
    return []


def collect(reading: Reading, entries: dict[tuple[str, int], Entry], log: list[Found]) -> list[str]:
    """Adds the batches of a stream to `log`. Each is one that somebody sent, with all of its messages."""
    violations, ordered_us = [], 0
    if reading.start != 0:
        violations.append(f"{reading.reader}: the stream begins at {reading.start}")
    for first, group in itertools.groupby(reading.messages, lambda delivered: delivered.first_offset):
        batch = list(group)
        head, messages = batch[0], [delivered.message for delivered in batch]
        try:
            publisher, serial, _ = parse_message(messages[0])
            entry = entries[publisher, serial]
        except (ValueError, KeyError):
            violations.append(f"nobody sent the batch at {first}: {messages[0][:80]!r}")
            continue
        if messages != entry.messages or (head.client_id, head.sequence) != (entry.client_id, entry.sequence):
            violations.append(f"the batch at {first} is not {entry}")
        if head.ordered_us < ordered_us:
            violations.append(f"time falls at {first}")
        ordered_us = head.ordered_us
        if not entry.sent:
            violations.append(f"{entry} is in the log, and was never sent")
        log.append(Found(reading.stream, first, entry))
    return violations


def acknowledged(journals: list[Journal], log: list[Found]) -> list[str]:
    """Each Ack names a place at which its batch is."""
    places: dict[tuple[str, int], set[tuple[int, int]]] = {}
    for found in log:
        places.setdefault((found.entry.publisher, found.entry.serial), set()).add((found.stream, found.first_offset))
    violations = []
    for entry in itertools.chain.from_iterable(journal.entries for journal in journals):
        there = places.get((entry.publisher, entry.serial), set())
        for stream, offset in entry.acks:
            if offset is None and not any(place[0] == stream for place in there):
                violations.append(f"{entry} was acknowledged, and is not in the log")
            elif offset is not None and (stream, offset) not in there:
                violations.append(f"{entry} was acknowledged at {offset} of {stream:#x}, and is at {sorted(there)}")
    return violations


def once(log: list[Found]) -> list[str]:
    """No batch is there twice."""
    violations, seen = [], {}
    for found in log:
        key = (found.entry.publisher, found.entry.serial)
        if key in seen:
            violations.append(f"{found.entry} is at {seen[key]} and at {found.first_offset}")
        seen[key] = found.first_offset
    return violations


def at_most_as_often_as_sent(log: list[Found]) -> list[str]:
    """A batch is there twice only if it was sent twice."""
    violations, counts = [], {}
    for found in log:
        key = (found.entry.publisher, found.entry.serial)
        counts[key] = counts.get(key, 0) + 1
        if counts[key] > len(found.entry.sent):
            violations.append(f"{found.entry} is in the log {counts[key]} times")
    return violations


def in_session_order(log: list[Found]) -> list[str]:
    """The batches of a client follow each other without a gap."""
    violations, due = [], {}
    for found in log:
        entry = found.entry
        if due.get(entry.client_id, entry.sequence) != entry.sequence:
            violations.append(f"{due[entry.client_id]} is due at {found.first_offset}, and {entry} is there")
        due[entry.client_id] = entry.sequence + 1
    return violations


def in_order_of_arrival(log: list[Found]) -> list[str]:
    """Batches that went over one connection, once, are in the order in which they were sent."""
    violations, newest = [], {}
    for found in log:
        entry = found.entry
        if len(entry.sent) != 1 or found.stream == GLOBAL:
            continue
        connection, number = entry.sent[0]
        before = newest.get((entry.publisher, connection), -1)
        if before > number:
            violations.append(f"{entry} is at {found.first_offset}, behind batch {before} of its connection")
        newest[entry.publisher, connection] = number
    return violations
