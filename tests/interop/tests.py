#!/usr/bin/python3
"""Tests of the client's own parts: frames, the fate of a session, and that the judge notices each violation."""

from __future__ import annotations

import copy
import threading
import unittest
from types import SimpleNamespace

import grpc

import frames
from checker import History, judge
from control import GLOBAL_ORDERS, STRONG, Control, Session, pb
from frames import GLOBAL, Malformed, Origin
from journal import Delivered, Entry, Journal, Reading, make_messages
from link import open_publish
from publisher import Publisher, fate

ORIGIN = Origin(client_id=7, session_epoch=1, session_slot=2, topic=3, topic_incarnation=4)


class Frames(unittest.TestCase):
    def test_the_checksum_is_castagnolis(self) -> None:
        # RFC 3720, B.4, and the value that the document names.
        self.assertEqual(frames.crc32c(bytes(32)), 0x8A9136AA)
        self.assertEqual(frames.crc32c(b"123456789"), 0xE3069283)

    def test_a_flipped_bit_is_refused(self) -> None:
        whole = frames.encode_batch(ORIGIN, 5, [b"one", b"", b"three"])
        self.assertEqual(frames.decode_batch(whole).messages, [b"one", b"", b"three"])
        for bit in range(8 * len(whole)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            with self.assertRaises(Malformed):
                frames.decode_batch(bytes(damaged))

    def test_fields_do_not_overlap(self) -> None:
        for kind, fields in frames.FIELDS.items():
            ends = 8
            for name, offset in sorted(fields.items(), key=lambda field: field[1]):
                self.assertGreaterEqual(offset, ends, (kind, name))
                ends = offset + frames.width(name)
            self.assertLessEqual(ends, 60, kind)


class Fate(unittest.TestCase):
    def session(self, epoch: int, next_sequence: int, order: int) -> Session:
        return Session(SimpleNamespace(order=order), 7, 1, 0, epoch, next_sequence, 128, 0, 77)

    def test_resume_goes_on_or_not(self) -> None:
        for order in GLOBAL_ORDERS:
            self.assertEqual(fate(self.session(0, 0, order), 5), "gone")
            self.assertEqual(fate(self.session(2, 4, order), 5), "lost")
            for next_sequence in (5, 6):
                self.assertEqual(fate(self.session(2, next_sequence, order), 5), "goes on")
        self.assertEqual(fate(self.session(2, 0, pb.ORDER_BROKER), 5), "goes on")


class Answer(grpc.RpcError):
    """A status that a leader answers."""

    def __init__(self, status: grpc.StatusCode) -> None:
        super().__init__(status)
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status


class Leader(Control):
    """A leader that answers what it is told to, and keeps the requests."""

    def __init__(self, *answers: object) -> None:
        super().__init__([], threading.Event())
        self._answers, self.requests = list(answers), []

    def leader(self, method: str, request: object, response: object) -> object:
        self.requests.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def opened(epoch: int, token: int) -> object:
    return pb.OpenSessionResponse(topic=pb.Topic(id=3, name="t", order=STRONG), epoch=epoch, token=token,
                                  window_batches=128)


HELD = Answer(grpc.StatusCode.ALREADY_EXISTS)


class Tokens(unittest.TestCase):
    def test_frames_and_calls_name_the_token(self) -> None:
        leader = Leader(opened(1, 1 << 63), opened(2, 1 << 63), pb.CloseSessionResponse())
        session = leader.open_session("t", 7, 1)
        self.assertEqual(frames.decode(open_publish(session, 0)).token, 1 << 63)
        leader.close_session(leader.resume_session(session))
        first, resumed, closed = leader.requests
        self.assertEqual((first.resume, first.token), (False, 0))
        self.assertEqual((resumed.resume, resumed.token, resumed.client_id, resumed.topic), (True, 1 << 63, 7, "t"))
        self.assertEqual((closed.token, closed.client_id, closed.epoch), (1 << 63, 7, 2))

    def test_another_status_than_already_exists_is_an_error(self) -> None:
        with self.assertRaises(Answer):
            Leader(Answer(grpc.StatusCode.INVALID_ARGUMENT)).open_session("t", 7, 1)

    def test_a_client_whose_id_is_held_chooses_another(self) -> None:
        leader = Leader(HELD, HELD, opened(1, 5))
        publisher = Publisher(leader, "t", Journal("p", 1), "seed")
        self.assertEqual(len({request.client_id for request in leader.requests}), 3)
        self.assertEqual({(request.resume, request.token) for request in leader.requests}, {(False, 0)})
        self.assertEqual(publisher.journal.turns, {"held": 2})

    def test_a_session_goes_on_with_its_token(self) -> None:
        for level, resume in ((0, False), (1, True)):
            leader = Leader(opened(1, 5), opened(2, 5))
            Publisher(leader, "t", Journal("p", level), "seed").reopen("reopened")
            first, following = leader.requests
            self.assertEqual((following.client_id, following.token, following.resume), (first.client_id, 5, resume))

    def test_a_client_at_level_0_whose_id_is_held_chooses_another(self) -> None:
        leader = Leader(opened(1, 5), HELD, opened(1, 6))
        Publisher(leader, "t", Journal("p", 0), "seed").reopen("reopened")
        first, refused, anew = leader.requests
        self.assertEqual((refused.client_id, refused.token), (first.client_id, 5))
        self.assertNotEqual(anew.client_id, first.client_id)
        self.assertEqual(anew.token, 0)


def history(order: str) -> History:
    """A correct history: one publisher, three batches of two messages, and two readers."""
    stream = GLOBAL if order in ("strong", "total") else 0
    journal, whole = Journal("p", 1), Reading("whole", stream)
    for serial in range(3):
        messages = make_messages("p", serial, 2, 10)
        first = len(whole.messages)
        journal.entries.append(Entry("p", serial, 7, serial, messages, [(1, serial)], [(stream, first)]))
        whole.messages += [Delivered(message, first, 7, serial, 0, 1000 + first) for message in messages]
    part = Reading("part", stream, 3, whole.messages[3:])
    return History("t", order, [journal], {stream: whole}, [part])


class Judge(unittest.TestCase):
    def judge(self, order: str, change: object) -> list[str]:
        changed = copy.deepcopy(history(order))
        change(changed, next(iter(changed.whole.values())), changed.journals[0].entries)
        # The other reader agrees, so that it is not what is found.
        if change is not readers_differ:
            changed.others = []
        return judge(changed)

    def test_a_correct_history_has_no_violation(self) -> None:
        for order in ("none", "broker", "total", "strong"):
            self.assertEqual(judge(history(order)), [])

    def test_each_violation_is_found(self) -> None:
        for order, change, text in VIOLATIONS:
            found = self.judge(order, change)
            self.assertTrue(any(text in each for each in found), (order, text, found))

    def test_what_an_order_allows_is_no_violation(self) -> None:
        self.assertEqual(self.judge("broker", sent_twice), [])
        self.assertEqual(self.judge("total", swapped), [])
        self.assertEqual(self.judge("none", swapped), [])
        self.assertEqual(self.judge("strong", unacknowledged_end_is_lost), [])


def reorder(history_: History, whole: Reading, entries: list[Entry], serials: list[int]) -> None:
    """Lays batches into the log in the order `serials`, and tells the publisher so."""
    whole.messages, stream = [], whole.stream
    for entry in entries:
        entry.acks = []
    for serial in serials:
        first, entry = len(whole.messages), entries[serial]
        whole.messages += [Delivered(message, first, 7, serial, 0, 1000 + first) for message in entry.messages]
        entry.acks.append((stream, first))


def swapped(history_: History, whole: Reading, entries: list[Entry]) -> None:
    reorder(history_, whole, entries, [1, 0, 2])


def twice(history_: History, whole: Reading, entries: list[Entry]) -> None:
    reorder(history_, whole, entries, [0, 1, 1, 2])


def sent_twice(history_: History, whole: Reading, entries: list[Entry]) -> None:
    twice(history_, whole, entries)
    entries[1].sent.append((2, 0))


def left_out(history_: History, whole: Reading, entries: list[Entry]) -> None:
    reorder(history_, whole, entries, [0, 2])


def lost(history_: History, whole: Reading, entries: list[Entry]) -> None:
    entries[2].acks = [(whole.stream, 4)]
    del whole.messages[4:]


def lost_offset_unknown(history_: History, whole: Reading, entries: list[Entry]) -> None:
    lost(history_, whole, entries)
    entries[2].acks = [(whole.stream, None)]


def unacknowledged_end_is_lost(history_: History, whole: Reading, entries: list[Entry]) -> None:
    lost(history_, whole, entries)
    entries[2].acks = []


def told_elsewhere(history_: History, whole: Reading, entries: list[Entry]) -> None:
    entries[1].acks.append((whole.stream, 4))


def changed_message(history_: History, whole: Reading, entries: list[Entry]) -> None:
    entries[1].messages[1] += b"y"


def strange(history_: History, whole: Reading, entries: list[Entry]) -> None:
    del entries[1]


def half_a_batch(history_: History, whole: Reading, entries: list[Entry]) -> None:
    del whole.messages[5]


def another_client(history_: History, whole: Reading, entries: list[Entry]) -> None:
    entries[1].client_id = 8


def never_sent(history_: History, whole: Reading, entries: list[Entry]) -> None:
    entries[1].sent = []


def time_falls(history_: History, whole: Reading, entries: list[Entry]) -> None:
    late = whole.messages[0]
    whole.messages[0] = Delivered(late.message, late.first_offset, late.client_id, late.sequence, 0, 9999)


def readers_differ(history_: History, whole: Reading, entries: list[Entry]) -> None:
    messages = history_.others[0].messages
    messages[0], messages[1] = messages[1], messages[0]


VIOLATIONS = [
    ("strong", swapped, "is due at"), ("strong", left_out, "is due at"), ("broker", swapped, "of its connection"),
    ("total", twice, "and at"), ("strong", twice, "and at"), ("total", sent_twice, "and at"),
    ("broker", twice, "2 times"), ("none", twice, "2 times"), ("none", lost, "was acknowledged at 4"),
    ("broker", lost, "was acknowledged at 4"), ("total", lost, "was acknowledged at 4"),
    ("total", lost_offset_unknown, "is not in the log"), ("strong", told_elsewhere, "was acknowledged at 4"),
    ("none", told_elsewhere, "was acknowledged at 4"), ("total", changed_message, "is not"),
    ("none", strange, "nobody sent"), ("total", half_a_batch, "is not"), ("strong", another_client, "is not"),
    ("none", never_sent, "was never sent"), ("total", time_falls, "time falls"), ("total", readers_differ, "part read"),
]

if __name__ == "__main__":
    unittest.main()
