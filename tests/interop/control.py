"""The control plane: gRPC with messages that protoc makes from control/proto/control.proto when a program starts."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

PROTO = Path(__file__).resolve().parents[2] / "control" / "proto"
SERVICE = "/embarcadero.control.v1.Control/"
# Wait for an answer, which a broker that stands still does not give. It doubles until one comes: the machine may be
# busy.
CALL_S, LONGEST_CALL_S = 4.0, 60.0
# Time between two attempts.
AGAIN_S = 0.05
# Statuses after which the leader is searched for again.
ELSEWHERE = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED,
             grpc.StatusCode.CANCELLED)
# A broker that is cut off closes nothing: pings find out.
CHANNEL = [("grpc.keepalive_time_ms", 2000), ("grpc.keepalive_timeout_ms", 2000),
           ("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0),
           ("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50),
           ("grpc.max_reconnect_backoff_ms", 200), ("grpc.enable_http_proxy", 0)]


def _compile() -> ModuleType:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["protoc", f"-I{PROTO}", f"--python_out={folder}", "control.proto"], check=True)
        sys.path.insert(0, folder)
        try:
            return importlib.import_module("control_pb2")
        finally:
            sys.path.remove(folder)


pb = _compile()
ORDERS = {"none": pb.ORDER_NONE, "broker": pb.ORDER_BROKER, "total": pb.ORDER_TOTAL, "strong": pb.ORDER_STRONG}
STRONG = pb.ORDER_STRONG
GLOBAL_ORDERS = (pb.ORDER_TOTAL, STRONG)


class Stopped(Exception):
    """The program is to end, and this thread with it."""


@dataclass(frozen=True)
class Session:
    """The epoch of a session, as OpenSession answers."""

    topic: Any
    client_id: int
    ack_level: int
    slot: int
    epoch: int
    next_sequence: int
    window_batches: int
    max_batch_bytes: int
    # Secret by which the brokers know the client.
    token: int = field(repr=False)

    @property
    def is_gone(self) -> bool:
        """True if the brokers do not know the client any more, or not by this token."""
        return self.epoch == 0


class Control:
    """Calls to a cluster. Each waits for a leader, or for a broker that answers, until `stop` is set."""

    def __init__(self, endpoints: list[str], stop: Any) -> None:
        self._endpoints, self._stop = list(endpoints), stop
        self._channels: dict[str, grpc.Channel] = {}
        self._leader: str | None = None
        self._turn = 0
        self._call_s = CALL_S

    def close(self) -> None:
        """Closes all channels."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _call(self, endpoint: str, method: str, request: Any, response: Any) -> Any:
        if endpoint not in self._channels:
            self._channels[endpoint] = grpc.insecure_channel(endpoint, CHANNEL)
        call = self._channels[endpoint].unary_unary(SERVICE + method, type(request).SerializeToString,
                                                    response.FromString)
        answer = call(request, timeout=self._call_s)
        self._call_s = CALL_S
        return answer

    def _again(self, error: grpc.RpcError) -> None:
        """Waits a moment if a call is to be made again; else raises its error."""
        if error.code() not in ELSEWHERE:
            raise error
        if self._stop.is_set():
            raise Stopped
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            self._call_s = min(2 * self._call_s, LONGEST_CALL_S)
        time.sleep(AGAIN_S)

    def anywhere(self, method: str, request: Any, response: Any) -> Any:
        """Asks one broker after the other, until one answers."""
        while True:
            self._turn += 1
            try:
                return self._call(self._endpoints[self._turn % len(self._endpoints)], method, request, response)
            except grpc.RpcError as error:
                self._again(error)

    def leader(self, method: str, request: Any, response: Any) -> Any:
        """Asks the leader."""
        while True:
            if self._leader is None:
                brokers = self.metadata().brokers
                self._leader = next((broker.control_endpoint for broker in brokers if broker.leader), None)
            try:
                if self._leader is not None:
                    return self._call(self._leader, method, request, response)
                if self._stop.is_set():
                    raise Stopped
                time.sleep(AGAIN_S)
            except grpc.RpcError as error:
                self._leader = None
                self._again(error)

    def metadata(self) -> Any:
        """The live brokers and the topics. Learns the endpoints of brokers that it did not know."""
        answer = self.anywhere("Metadata", pb.MetadataRequest(), pb.MetadataResponse)
        for broker in answer.brokers:
            if broker.control_endpoint not in self._endpoints:
                self._endpoints.append(broker.control_endpoint)
        return answer

    def brokers(self) -> dict[int, tuple[str, int]]:
        """Data endpoints of the live brokers, by id."""
        found = {}
        for broker in self.metadata().brokers:
            host, port = broker.data_endpoint.rsplit(":", 1)
            found[broker.id] = (host, int(port))
        return found

    def create_topic(self, name: str, order: str, ack_level: int = 1, replication_factor: int = 1) -> Any:
        """Creates a topic, if it is not there, and returns it."""
        request = pb.CreateTopicRequest(name=name, order=ORDERS[order], ack_level=ack_level,
                                        replication_factor=replication_factor)
        try:
            return self.leader("CreateTopic", request, pb.Topic)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.ALREADY_EXISTS:
                raise
            return self.describe(name).topic

    def delete_topic(self, name: str) -> None:
        """Deletes a topic. An answer that was late or lost is as good as one."""
        try:
            self.leader("DeleteTopic", pb.DeleteTopicRequest(name=name), pb.DeleteTopicResponse)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise

    def describe(self, name: str) -> Any:
        """A topic and the bounds of its streams."""
        return self.anywhere("DescribeTopic", pb.DescribeTopicRequest(name=name), pb.TopicDescription)

    def open_session(self, topic: str, client_id: int, ack_level: int, token: int = 0) -> Session | None:
        """Opens the next epoch of a client that knows of no batch that it sent. `token` is 0 if it has none.

        None if somebody else holds the id. That may be this client, if an answer was lost, and the token with it.
        """
        request = pb.OpenSessionRequest(topic=topic, client_id=client_id, ack_level=ack_level, token=token)
        try:
            return self._open(request)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.ALREADY_EXISTS:
                raise
            return None

    def resume_session(self, session: Session) -> Session:
        """Opens the next epoch of a session that is to go on."""
        request = pb.OpenSessionRequest(topic=session.topic.name, client_id=session.client_id,
                                        ack_level=session.ack_level, resume=True, token=session.token)
        return self._open(request)

    def _open(self, request: Any) -> Session:
        answer = self.leader("OpenSession", request, pb.OpenSessionResponse)
        return Session(answer.topic, request.client_id, request.ack_level, answer.slot, answer.epoch,
                       answer.next_sequence, answer.window_batches, answer.max_batch_bytes, answer.token)

    def close_session(self, session: Session) -> None:
        """Ends a session in order."""
        request = pb.CloseSessionRequest(slot=session.slot, client_id=session.client_id, epoch=session.epoch,
                                         token=session.token)
        self.leader("CloseSession", request, pb.CloseSessionResponse)
