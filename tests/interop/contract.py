#!/usr/bin/python3
"""Holds a cluster to statements of docs/reference/protocol.md that a history does not reach.

    contract.py --control ADDRESS,ADDRESS,... [--short SETTING]

The cluster has two brokers or more, whose `gap_lease_ms` and `session_idle_ms` are long. With `--short`, the named one
is short, and the checks are those of what ends after it. Prints the name of each check before it begins; fails at the
first that does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import threading
import time
from dataclasses import replace
from typing import Callable

import grpc

import frames
from control import Control, Session
from frames import Frame, encode_batch
from link import Disconnected, Link, Refused, open_publish, origin_of, subscribe

Check = Callable[["Cluster"], None]
# Checks by the setting that they want to be short.
CHECKS: dict[str | None, list[Check]] = {None: [], "gap_lease_ms": [], "session_idle_ms": []}
# Wait for an answer that only a broken broker does not give.
PATIENCE_S = 240.0
# Times that an answer may be lost, and the token of a session with it.
ATTEMPTS = 5
# Time between two attempts to open an id that is held.
AGAIN_S = 0.05


def check(function: Check) -> Check:
    """Adds a check to those that run."""
    CHECKS[None].append(function)
    return function


def check_of(short: str) -> Callable[[Check], Check]:
    """Adds a check to those of a setting that is short."""
    def add(function: Check) -> Check:
        CHECKS[short].append(function)
        return function
    return add


def attempt(opening: Callable[[], Session | None]) -> Session:
    """Opens a session under an id that nobody holds, unless an answer was lost. Begins anew then."""
    for _ in range(ATTEMPTS):
        if session := opening():
            return session
    raise AssertionError("somebody holds the id")


class Talk:
    """A connection, read frame by frame."""

    def __init__(self, endpoint: tuple[str, int], opening: bytes) -> None:
        self._link = Link(endpoint)
        self.send(opening)

    def send(self, data: bytes) -> None:
        self._link.send(data)

    def next(self) -> tuple[Frame, bytes]:
        """The next frame, and what follows it. Raises `Refused` or `Disconnected` if none comes."""
        until = time.monotonic() + PATIENCE_S
        while True:
            for come in self._link.frames():
                return come
            assert time.monotonic() < until, "no answer"
            self._link.pump(1.0)

    def expect(self, kind: int) -> Frame:
        """The next frame, which has to be of a kind."""
        frame, _ = self.next()
        assert frame.kind == kind, f"{frame} instead of kind {kind}"
        return frame

    def refusal(self) -> Refused:
        """The ErrorFrame that ends the connection, behind whatever came before."""
        try:
            while True:
                self.next()
        except Refused as refused:
            return refused

    def close(self) -> None:
        self._link.close()


class Cluster:
    """The cluster, and topics of each order in it."""

    def __init__(self, endpoints: list[str]) -> None:
        self.control = Control(endpoints, threading.Event())
        self.brokers = self.control.brokers()
        self.topics = {order: self.control.create_topic(f"contract-{order}", order)
                       for order in ("none", "broker", "total", "strong")}
        self._random = random.Random(1)

    def open(self, order: str, level: int = 1) -> Session:
        """Opens the session of a new client."""
        name = f"contract-{order}"
        return attempt(lambda: self.control.open_session(name, self._random.randrange(1, 1 << 64), level))

    def open_anew(self, session: Session) -> Session | None:
        """Opens a session's id without `resume`. None if somebody else holds it."""
        return self.control.open_session(session.topic.name, session.client_id, session.ack_level, session.token)

    def await_open(self, session: Session) -> Session:
        """Opens a session's id without `resume`, once nobody holds it."""
        until = time.monotonic() + PATIENCE_S
        while (opened := self.open_anew(session)) is None:
            assert time.monotonic() < until, "the id is held for ever"
            time.sleep(AGAIN_S)
        return opened

    def close_status(self, session: Session) -> grpc.StatusCode:
        """Closes a session, and returns the status of the answer."""
        try:
            self.control.close_session(session)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    def talk(self, opening: bytes, broker: int | None = None) -> Talk:
        return Talk(self.brokers[min(self.brokers) if broker is None else broker], opening)

    def publisher(self, session: Session, resume_from: int | None = None, broker: int | None = None) -> Talk:
        """A connection that may publish."""
        resume_from = session.next_sequence if resume_from is None else resume_from
        talk = self.talk(open_publish(session, resume_from), broker)
        ready = talk.expect(frames.PUBLISH_READY)
        assert ready.window_batches == session.window_batches
        return talk

    def refused(self, opening: bytes, code: int, broker: int | None = None) -> Refused:
        """Sends what has to be refused with `code`."""
        refused = self.talk(opening, broker).refusal()
        assert refused.code == code, refused
        return refused


def batch(session: Session, sequence: int, text: str = "", count: int = 1) -> bytes:
    """A batch that names its sequence."""
    return encode_batch(origin_of(session), sequence, [f"{sequence}{text}".encode()] * count)


def raw_batch(session: Session, body: bytes, payload_bytes: int, count: int) -> bytes:
    """A batch with any body and counts."""
    fields = origin_of(session).fields()
    return frames.encode(frames.BATCH_HEADER, frames.BODY_CHECKSUM, sequence=session.next_sequence,
                         payload_bytes=payload_bytes, message_count=count, body_checksum=frames.crc32c(body),
                         **fields) + body


def publish(talk: Talk, session: Session, sequence: int) -> Frame:
    """Publishes a batch, and returns its Ack. The session is not fenced before."""
    talk.send(batch(session, sequence))
    ack = talk.expect(frames.ACK)
    assert ack.sequence == sequence, ack
    return ack


def strangers(session: Session) -> list[Session]:
    """A session as those name it who know all but its token: without one, and with another."""
    return [replace(session, token=token) for token in (0, session.token ^ 1 or 2)]


# --- Frames -----------------------------------------------------------------------------------------------------------


@check
def frames_that_a_receiver_must_refuse(cluster: Cluster) -> None:
    session = cluster.open("strong")
    whole = open_publish(session, 0)
    for at in (0, 5, 59, 60):  # magic, version, a reserved byte under a wrong checksum, the checksum
        damaged = bytearray(whole)
        damaged[at] ^= 1
        cluster.refused(bytes(damaged), frames.BAD_FRAME)
    for at, value in ((4, 77), (6, 1), (44, 1), (56, 1)):  # kind, flags, reserved bytes
        sealed = bytearray(whole)
        sealed[at] = value
        sealed[60:] = frames.crc32c(sealed[:60]).to_bytes(4, "little")
        cluster.refused(bytes(sealed), frames.BAD_FRAME)


@check
def batches_that_a_broker_must_refuse(cluster: Cluster) -> None:
    for body, payload_bytes, count in (
            (b"", 0, 0),  # no message
            (b"abc\1" + b"\3\0\0\0", 3, 1),  # padding
            (b"abc\0" + b"\2\0\0\0", 3, 1)):  # lengths
        session = cluster.open("strong")
        talk = cluster.publisher(session)
        talk.send(raw_batch(session, body, payload_bytes, count))
        assert talk.refusal().code == frames.BAD_BATCH
    session = cluster.open("strong")
    talk = cluster.publisher(session)
    # Header and body of one message: a byte more than fits.
    talk.send(raw_batch(session, b"", session.max_batch_bytes - 64 - 4 + 1, 1))
    assert talk.refusal().code == frames.BAD_BATCH
    other = cluster.open("strong")
    talk = cluster.publisher(session)
    talk.send(batch(other, 0))
    assert talk.refusal().code == frames.BAD_BATCH


@check
def empty_messages_are_messages(cluster: Cluster) -> None:
    session = cluster.open("strong")
    talk = cluster.publisher(session)
    talk.send(encode_batch(origin_of(session), session.next_sequence, [b"", b"", b"last"]))
    offset = talk.expect(frames.ACK).first_offset
    reader = cluster.talk(subscribe(session.topic, frames.GLOBAL, frames.AT_OFFSET, offset + 2))
    assert reader.expect(frames.SUBSCRIBE_READY).start_offset == offset + 2
    deliver, data = reader.next()
    assert deliver.first_offset == offset and frames.decode_batch(data).messages == [b"", b"", b"last"]
    assert len(data) == deliver.batch_bytes


# --- Sessions ---------------------------------------------------------------------------------------------------------


@check
def an_unknown_client_is_gone(cluster: Cluster) -> None:
    session = cluster.open("strong")
    assert cluster.control.resume_session(replace(session, client_id=session.client_id ^ 1 or 2)).is_gone


@check
def an_epoch_ends_with_fenced_and_unknown_session(cluster: Cluster) -> None:
    for order in cluster.topics:
        session = cluster.open(order)
        talk = cluster.publisher(session)
        following = cluster.control.resume_session(session)
        assert following.epoch > session.epoch
        fenced = talk.expect(frames.FENCED)
        assert fenced.session_epoch == session.epoch and fenced.committed == session.next_sequence
        assert talk.refusal().code == frames.UNKNOWN_SESSION
        cluster.refused(open_publish(session, 0), frames.UNKNOWN_SESSION)


@check
def close_session_is_ok_if_no_such_session_is_open(cluster: Cluster) -> None:
    session = cluster.open("strong")
    talk = cluster.publisher(session)
    for changed in ({"client_id": session.client_id ^ 1 or 2}, {"epoch": session.epoch + 1}, {"slot": 1 << 31}):
        cluster.control.close_session(replace(session, token=0, **changed))
    publish(talk, session, session.next_sequence)
    cluster.control.close_session(session)
    talk.expect(frames.FENCED)
    cluster.refused(open_publish(session, 0), frames.UNKNOWN_SESSION)
    for each in (session, *strangers(session)):
        cluster.control.close_session(each)


@check
def another_level_than_the_sessions_is_refused(cluster: Cluster) -> None:
    session = cluster.open("strong")
    cluster.refused(open_publish(replace(session, ack_level=0), 0), frames.ACK_LEVEL)


@check
def acks_keep_the_order_of_a_connection(cluster: Cluster) -> None:
    for order in cluster.topics:
        session = cluster.open(order)
        first = session.next_sequence
        talks = [cluster.publisher(session, broker=broker) for broker in cluster.brokers]
        carried: list[list[int]] = [[] for _ in talks]
        for sequence, (number, talk) in zip(range(first, first + 60), itertools.cycle(enumerate(talks))):
            talk.send(batch(session, sequence))
            carried[number].append(sequence)
        for talk, sequences in zip(talks, carried):
            assert [talk.expect(frames.ACK).sequence for _ in sequences] == sequences


@check
def the_last_128_acks_are_repeated(cluster: Cluster) -> None:
    for order in ("strong", "total"):
        session = cluster.open(order)
        first = session.next_sequence
        talk, told = cluster.publisher(session), {}
        for sequence in range(first, first + 140):
            talk.send(batch(session, sequence))
            told[sequence] = talk.expect(frames.ACK).first_offset
        end = first + 140
        for resume_from in (0, end - 3):
            again = cluster.publisher(session, resume_from, max(cluster.brokers))
            for sequence in range(max(resume_from, end - 128), end):
                ack = again.expect(frames.ACK)
                assert (ack.sequence, ack.first_offset, ack.committed) == (sequence, told[sequence], end), ack


@check_of("gap_lease_ms")
def a_gap_fences_order_strong_and_the_rest_goes_on(cluster: Cluster) -> None:
    session = cluster.open("strong")
    first = session.next_sequence
    talk = cluster.publisher(session)
    talk.send(batch(session, first) + batch(session, first + 2))
    assert talk.expect(frames.ACK).sequence == first
    assert talk.expect(frames.FENCED).committed == first + 1
    assert talk.refusal().code == frames.UNKNOWN_SESSION
    following = cluster.control.resume_session(session)
    assert following.next_sequence == first + 1
    talk = cluster.publisher(following)
    talk.send(batch(following, first + 1) + batch(following, first + 2))
    assert [talk.expect(frames.ACK).sequence for _ in range(2)] == [first + 1, first + 2]


@check
def order_total_acknowledges_ahead_of_a_gap_and_remembers_it(cluster: Cluster) -> None:
    session = cluster.open("total")
    first = session.next_sequence
    talk = cluster.publisher(session)
    talk.send(batch(session, first + 1))
    ahead = talk.expect(frames.ACK)
    assert (ahead.sequence, ahead.committed) == (first + 1, first)
    following = cluster.control.resume_session(session)
    assert following.next_sequence == first
    talk = cluster.publisher(following)
    repeated = talk.expect(frames.ACK)
    assert (repeated.sequence, repeated.first_offset) == (first + 1, ahead.first_offset)
    talk.send(batch(following, first) + batch(following, first + 1))
    assert talk.expect(frames.ACK).sequence == first
    again = talk.expect(frames.ACK)
    assert (again.first_offset, again.committed) == (ahead.first_offset, first + 2)


@check
def a_duplicate_is_recognized_in_global_orders_alone(cluster: Cluster) -> None:
    for order, topic in cluster.topics.items():
        session = cluster.open(order)
        sequence = session.next_sequence
        talk = cluster.publisher(session)
        talk.send(batch(session, sequence) + batch(session, sequence))
        one, other = talk.expect(frames.ACK), talk.expect(frames.ACK)
        assert one.sequence == other.sequence == sequence
        is_global = order in ("strong", "total")
        assert (one.first_offset == other.first_offset) == is_global
        assert (one.stream == frames.GLOBAL) == is_global
        assert is_global or (one.committed, session.next_sequence) == (0, 0)
        if not is_global:
            again = cluster.publisher(session, 0)
            again.send(batch(session, 7))
            assert again.expect(frames.ACK).sequence == 7, "no Ack is repeated"


@check
def without_resume_numbers_begin_behind_all_batches(cluster: Cluster) -> None:
    session = cluster.open("total")
    first = session.next_sequence
    talk = cluster.publisher(session)
    talk.send(batch(session, first) + batch(session, first + 5))
    assert [talk.expect(frames.ACK).sequence for _ in range(2)] == [first, first + 5]
    following = cluster.open_anew(session)
    assert following.next_sequence == first + 6


# --- Tokens -----------------------------------------------------------------------------------------------------------


@check
def open_publish_needs_the_token(cluster: Cluster) -> None:
    for order in cluster.topics:
        session = cluster.open(order)
        talk = cluster.publisher(session)
        for stranger, broker in itertools.product(strangers(session), cluster.brokers):
            cluster.refused(open_publish(stranger, 0), frames.UNKNOWN_SESSION, broker)
        publish(talk, session, session.next_sequence)


@check
def close_session_needs_the_token(cluster: Cluster) -> None:
    for order in cluster.topics:
        session = cluster.open(order)
        talk = cluster.publisher(session)
        for stranger in strangers(session):
            assert cluster.close_status(stranger) == grpc.StatusCode.PERMISSION_DENIED
        publish(talk, session, session.next_sequence)
        assert cluster.close_status(session) == grpc.StatusCode.OK
        talk.expect(frames.FENCED)


@check
def resume_needs_the_token(cluster: Cluster) -> None:
    for order in cluster.topics:
        session = cluster.open(order)
        talk = cluster.publisher(session)
        for stranger in strangers(session):
            gone = cluster.control.resume_session(stranger)
            assert gone.is_gone and gone.token != session.token
        publish(talk, session, session.next_sequence)


@check
def an_id_is_its_holders(cluster: Cluster) -> None:
    for order in cluster.topics:
        session = cluster.open(order)
        talk = cluster.publisher(session)
        for turn in range(2):  # before and after the first batch
            assert [cluster.open_anew(stranger) for stranger in strangers(session)] == [None, None]
            publish(talk, session, session.next_sequence + turn)


@check
def a_token_stays_the_same_in_all_epochs(cluster: Cluster) -> None:
    tokens = set()
    for order in cluster.topics:
        session = cluster.open(order)
        tokens.add(session.token)
        for reopen in (cluster.control.resume_session, cluster.open_anew, cluster.control.resume_session):
            following = reopen(session)
            assert following.epoch > session.epoch and following.token == session.token
            # As a client would ask to whom the answer did not come.
            again = reopen(session)
            assert again.epoch > following.epoch and again.token == session.token
            publish(cluster.publisher(again), again, again.next_sequence)
    assert len(tokens) == len(cluster.topics) and 0 not in tokens


def check_new_holder(cluster: Cluster, before: Session, session: Session) -> None:
    """Checks that a session which was opened anew without the token is another client's."""
    assert session.epoch > before.epoch and session.token not in (0, before.token)
    assert cluster.control.resume_session(replace(session, token=before.token)).is_gone
    cluster.refused(open_publish(replace(session, token=before.token), 0), frames.UNKNOWN_SESSION)
    publish(cluster.publisher(session), session, session.next_sequence)


@check
def a_closed_id_is_opened_anew_without_the_token(cluster: Cluster) -> None:
    for order in cluster.topics:
        def opening() -> Session | None:
            nonlocal before
            before = cluster.open(order)
            publish(cluster.publisher(before), before, before.next_sequence)
            cluster.control.close_session(before)
            return cluster.open_anew(replace(before, token=0))
        before = None
        session = attempt(opening)
        assert session.next_sequence == before.next_sequence + (order in ("strong", "total"))
        check_new_holder(cluster, before, session)


@check
def nothing_that_others_read_has_a_token(cluster: Cluster) -> None:
    session = cluster.open("strong")
    offset = publish(cluster.publisher(session), session, session.next_sequence).first_offset
    reader = cluster.talk(subscribe(session.topic, frames.GLOBAL, frames.AT_OFFSET, offset))
    reader.expect(frames.SUBSCRIBE_READY)
    deliver, data = reader.next()
    described = [cluster.control.metadata(), cluster.control.describe(session.topic.name)]
    for text in (frames.encode(deliver.kind, **deliver.fields), data, *map(str, described)):
        secret = str(session.token) if isinstance(text, str) else session.token.to_bytes(8, "little")
        assert secret not in text


@check_of("gap_lease_ms")
def a_client_without_a_batch_holds_its_id_for_gap_lease_ms(cluster: Cluster) -> None:
    held = [cluster.open(order) for order in cluster.topics]
    for session in held:
        publish(cluster.publisher(session), session, session.next_sequence)
    for order in ("strong", "total"):
        session = cluster.open(order)
        talk = cluster.publisher(session)
        following = cluster.await_open(replace(session, token=0))
        talk.expect(frames.FENCED)
        assert talk.refusal().code == frames.UNKNOWN_SESSION
        check_new_holder(cluster, session, following)
    # Those have been idle for longer.
    assert [cluster.open_anew(stranger) for session in held for stranger in strangers(session)] == [None] * 8


@check_of("session_idle_ms")
def an_idle_client_holds_its_id_for_session_idle_ms(cluster: Cluster) -> None:
    held = [cluster.open(order) for order in ("none", "broker")]
    holding = [cluster.publisher(session) for session in held]
    for order in ("strong", "total"):
        session = cluster.open(order)
        talk = cluster.publisher(session)
        publish(talk, session, session.next_sequence)
        following = cluster.await_open(replace(session, token=0))
        talk.expect(frames.FENCED)
        assert talk.refusal().code == frames.UNKNOWN_SESSION
        assert following.next_sequence == session.next_sequence + 1
        check_new_holder(cluster, session, following)
    # Those have been idle for longer, and have connections.
    assert [cluster.open_anew(stranger) for session in held for stranger in strangers(session)] == [None] * 4
    for session, talk in zip(held, holding):
        talk.close()
        cluster.await_open(replace(session, token=0))


# --- Subscriptions ----------------------------------------------------------------------------------------------------


@check
def a_position_comes_after_subscribe(cluster: Cluster) -> None:
    cluster.refused(frames.encode(frames.POSITION), frames.BAD_FRAME)
    reader = cluster.talk(subscribe(cluster.topics["strong"], frames.GLOBAL, frames.LATEST))
    end = reader.expect(frames.SUBSCRIBE_READY).next_offset
    reader.send(frames.encode(frames.POSITION) * 3)
    assert [reader.expect(frames.POSITION).next_offset for _ in range(3)] == [end] * 3


@check
def a_start_beyond_the_end_is_refused(cluster: Cluster) -> None:
    topic = cluster.topics["strong"]
    end = cluster.control.describe(topic.name).streams[0].next_offset
    reader = cluster.talk(subscribe(topic, frames.GLOBAL, frames.AT_OFFSET, end))
    assert reader.expect(frames.SUBSCRIBE_READY).start_offset == end
    for start in (end + 1, (1 << 64) - 1):
        assert cluster.refused(subscribe(topic, frames.GLOBAL, frames.AT_OFFSET, start),
                               frames.OFFSET_OUT_OF_RANGE).detail == 0
    future = cluster.talk(subscribe(topic, frames.GLOBAL, frames.AT_TIME, (1 << 63)))
    assert future.expect(frames.SUBSCRIBE_READY).start_offset == end


@check
def a_brokers_own_stream_is_served_by_that_broker(cluster: Cluster) -> None:
    for order in ("none", "broker"):
        topic = cluster.topics[order]
        cluster.refused(subscribe(topic, max(cluster.brokers), frames.EARLIEST), frames.UNKNOWN_TOPIC)
        cluster.refused(subscribe(topic, frames.GLOBAL, frames.EARLIEST), frames.UNKNOWN_TOPIC)
        cluster.talk(subscribe(topic, min(cluster.brokers), frames.EARLIEST)).expect(frames.SUBSCRIBE_READY)
    cluster.refused(subscribe(cluster.topics["strong"], min(cluster.brokers), frames.EARLIEST), frames.UNKNOWN_TOPIC)


@check
def sessions_of_a_deleted_topic_hear_so(cluster: Cluster) -> None:
    topic = cluster.control.create_topic("contract-deleted", "strong")
    session = cluster.open("deleted")
    talk = cluster.publisher(session)
    reader = cluster.talk(subscribe(topic, frames.GLOBAL, frames.EARLIEST))
    reader.expect(frames.SUBSCRIBE_READY)
    cluster.control.delete_topic(topic.name)
    for each in (talk, reader):
        assert each.refusal().code == frames.TOPIC_DELETED
    # It is still being deleted if the answer was late.
    assert cluster.talk(open_publish(session, 0)).refusal().code in (frames.UNKNOWN_TOPIC, frames.TOPIC_DELETED)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control", required=True)
    parser.add_argument("--short", choices=[setting for setting in CHECKS if setting])
    arguments = parser.parse_args()
    cluster = Cluster(arguments.control.split(","))
    for each in CHECKS[arguments.short]:
        print(f"{each.__name__} ...", flush=True)
        each(cluster)
    print("ok", flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
