#!/usr/bin/python3
"""Publishes to topics of all four orders and reads them while somebody harms the brokers, then judges what happened.

Written from docs/reference/protocol.md and control/proto/control.proto alone; over TCP.

    history.py --control ADDRESS,ADDRESS,... --seed NUMBER [--durable]

It prints a line `acks NUMBER` whenever more batches were acknowledged. Once a line `calm` comes on standard input, the
brokers are harmed no more: every publisher then has to go on, and every batch has to be acknowledged. The last line is
`ok`, with the numbers of what happened, or the violations come before the exit with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, Callable

import frames
from checker import History, judge
from control import Control, Stopped
from journal import Journal, Reading, parse_message
from publisher import Publisher, publish
from subscriber import Subscriber

# Batches that each publisher publishes once the brokers are harmed no more.
MORE = 20
# Time without an Ack that only broken brokers, or a broken client, reach.
PATIENCE_S = 240.0
# Acks between two lines that tell of them.
TOLD_ACKS = 50


@dataclass
class TopicPlan:
    """A topic, and the acknowledgement levels of its publishers."""

    name: str
    order: str
    levels: list[int]
    topic: Any = None
    journals: list[Journal] = field(default_factory=list)
    live: list[Reading] = field(default_factory=list)

    @property
    def is_global(self) -> bool:
        return self.order in ("strong", "total")


def plans(durable: bool) -> list[TopicPlan]:
    """The topics of a history. Level 2 needs brokers with disks."""
    top = 2 if durable else 1
    return [TopicPlan("strong", "strong", [1, top, 0]), TopicPlan("total", "total", [1, top]),
            TopicPlan("broker", "broker", [1, top]), TopicPlan("none", "none", [1])]


class Run:
    """A history that is being made: threads that publish and read until it ends."""

    def __init__(self, endpoints: list[str], seed: int, durable: bool) -> None:
        self._endpoints, self._seed, self._durable = endpoints, seed, durable
        self.stop, self.calm, self.published = threading.Event(), threading.Event(), threading.Event()
        self.failures: list[str] = []
        self._threads: list[threading.Thread] = []
        self.plans = plans(durable)
        # Highest serial of each publisher that a reader read.
        self._seen: dict[str, int] = {}

    def control(self) -> Control:
        return Control(self._endpoints, self.stop)

    def _start(self, name: str, body: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                body()
            except Stopped:
                pass
            except Exception:
                self.failures.append(f"{name}: {traceback.format_exc()}")
                self.stop.set()
        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)
        return thread

    # --- Publishers ---------------------------------------------------------------------------------------------------

    def publish_all(self) -> list[threading.Thread]:
        """Creates the topics and starts their publishers."""
        control, started = self.control(), []
        for plan in self.plans:
            durable = max(plan.levels) == 2
            plan.topic = control.create_topic(plan.name, plan.order, 2 if durable else 1, 2 if durable else 1)
            for number, level in enumerate(plan.levels):
                journal = Journal(f"{plan.name}-{number}", level)
                plan.journals.append(journal)
                started.append(self._start(journal.publisher, lambda plan=plan, journal=journal:
                                           self._publish(plan, journal)))
        return started

    def _publish(self, plan: TopicPlan, journal: Journal) -> None:
        publisher = Publisher(self.control(), plan.name, journal, f"{self._seed} {journal.publisher}")
        publish(publisher, self.calm, self.stop, MORE, lambda name, serial: self._seen.get(name, -1) >= serial)

    def acks(self) -> int:
        """Number of Acks so far."""
        return sum(len(entry.acks) for plan in self.plans for journal in plan.journals for entry in journal.entries)

    def waiting(self) -> list[str]:
        """What the publishers wait for, in words."""
        found = []
        for journal in (journal for plan in self.plans for journal in plan.journals):
            lack = [entry for entry in journal.entries if entry.sent and not entry.acks]
            found.append(f"{journal.publisher}, {journal.turns}: {len(lack)} batches lack an Ack, such as {lack[:2]}")
        return found

    # --- Readers ------------------------------------------------------------------------------------------------------

    def read_all(self, brokers: list[int]) -> None:
        """Starts readers that follow the streams while they grow."""
        for plan in self.plans:
            for stream in [frames.GLOBAL] if plan.is_global else brokers:
                name = f"{plan.name}/{stream:#x}"
                self._follow(plan, Reading(f"follower of {name}", stream), frames.EARLIEST)
                if plan.is_global:
                    self._follow(plan, Reading(f"latecomer of {name}", stream), frames.LATEST)

    def _follow(self, plan: TopicPlan, reading: Reading, start_kind: int) -> None:
        plan.live.append(reading)
        self._start(reading.reader, lambda: self._read_on(plan, reading, start_kind))

    def _read_on(self, plan: TopicPlan, reading: Reading, start_kind: int) -> None:
        seed = f"{self._seed} {reading.reader}"
        subscriber, chance = Subscriber(self.control(), plan.topic, reading, start_kind, 0, seed), random.Random(seed)
        told = 0
        while not self.published.is_set() and not self.stop.is_set():
            subscriber.poll()
            for delivered in reading.messages[told:]:
                publisher, serial, _ = parse_message(delivered.message)
                self._seen[publisher] = max(self._seen.get(publisher, -1), serial)
            told = len(reading.messages)
            if chance.random() < 0.02:
                subscriber.hop()
                told = min(told, len(reading.messages))
        subscriber.close()

    def _read_to(self, plan: TopicPlan, reading: Reading, kind: int, start: int, end: int) -> Reading:
        subscriber = Subscriber(self.control(), plan.topic, reading, kind, start, f"{self._seed} {reading.reader}")
        while reading.end < end and not self.stop.is_set():
            subscriber.poll()
        subscriber.close()
        # More may have come meanwhile, of publishers that nothing is acknowledged to.
        del reading.messages[max(0, end - reading.start):]
        return reading

    # --- The end ------------------------------------------------------------------------------------------------------

    def read_whole(self, plan: TopicPlan) -> History:
        """Reads all streams of a topic, several times and from several places."""
        chance, control = random.Random(f"{self._seed} {plan.name}"), self.control()
        history = History(plan.name, plan.order, plan.journals, {})
        for stream in control.describe(plan.name).streams:
            which, end = stream.broker, stream.next_offset
            of = f"{plan.name}/{which:#x}"
            whole = self._read_to(plan, Reading(f"reader of {of}", which), frames.EARLIEST, 0, end)
            history.whole[which] = whole
            for reading in (reading for reading in plan.live if reading.stream == which):
                del reading.messages[max(0, end - reading.start):]
                history.others.append(reading)
            if end == 0:
                continue
            start = chance.randrange(end)
            starts = (("second reader", frames.EARLIEST, 0), ("reader from an offset", frames.AT_OFFSET, start))
            for name, kind, at in starts:
                reading = Reading(f"{name} of {of}", which)
                history.others.append(self._read_to(plan, reading, kind, at, end))
            history.others.append(self._read_from_time(plan, whole, chance.choice(whole.messages).ordered_us, end))
        return history

    def _read_from_time(self, plan: TopicPlan, whole: Reading, time_us: int, end: int) -> Reading:
        reading = Reading(f"reader of {plan.name} from time {time_us}", whole.stream)
        self._read_to(plan, reading, frames.AT_TIME, time_us, end)
        due = next(each.first_offset for each in whole.messages if each.ordered_us >= time_us)
        if reading.start != due:
            reading.violations.append(f"{reading.reader} begins at {reading.start}, the time at {due}")
        return reading

    def verdict(self) -> list[str]:
        """Ends the readers, reads everything again, and judges."""
        self.published.set()
        for thread in self._threads:
            thread.join()
        return [text for plan in self.plans for text in judge(self.read_whole(plan))]

    def totals(self) -> dict[str, int]:
        """How often the publishers and readers met each turn of the protocol."""
        found = {"batches": 0, "acks": self.acks()}
        for plan in self.plans:
            for part in (*plan.journals, *plan.live):
                for name, count in part.turns.items():
                    found[name] = found.get(name, 0) + count
            found["batches"] += sum(len(journal.entries) for journal in plan.journals)
            found[f"read {plan.name}"] = sum(len(reading.messages) for reading in plan.live)
        return found


def await_calm(run: Run) -> None:
    """Waits for the line `calm`. Ends the program if whoever started it is gone."""
    for line in sys.stdin:
        if line.strip() == "calm":
            run.calm.set()
            return
    os._exit(2)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--durable", action="store_true")
    arguments = parser.parse_args()
    run = Run(arguments.control.split(","), arguments.seed, arguments.durable)
    publishers = run.publish_all()
    run.read_all(sorted(run.control().brokers()))
    threading.Thread(target=await_calm, args=(run,), daemon=True).start()
    told, newest, since = 0, 0, time.monotonic()
    while any(thread.is_alive() for thread in publishers) and not run.failures:
        time.sleep(0.05)
        acks = run.acks()
        if acks > newest:
            newest, since = acks, time.monotonic()
        if acks >= told + TOLD_ACKS:
            told = acks
            print(f"acks {told}", flush=True)
        if time.monotonic() - since > PATIENCE_S:
            run.failures += [f"no progress: {text}" for text in run.waiting()]
    violations = run.failures or run.verdict() or run.failures
    for text in violations:
        print(text, flush=True)
    print(json.dumps({"violations": len(violations)} | run.totals()), flush=True)
    if not violations:
        print("ok", flush=True)
    return 1 if violations else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Threads of channels may still wait for brokers.
    os._exit(status)
