"""uvicorn's connections, with limits on clients: each whole request is answered, and none is waited for without end."""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LARGEST_HEADERS = 65_536  # bytes
MOST_CONNECTIONS = 500  # half of the files that a process may usually open

REQUEST_TIMEOUT = 10  # seconds for a whole request to arrive, and for one to be answered whose client sends no more
LINGER_TIMEOUT = 3  # seconds for a client to read some of the last answer, and to close

RETRY_SOON = {"Retry-After": "1"}
SHUTTING_DOWN = "the server is shutting down"


class LingeringTransport:
    """A connection whose last answer reaches the client.

    A socket that is closed with bytes unread resets the connection, and a client may lose an answer that it has not read by
    then. So :meth:`close` ends only the sending; what arrives is read and dropped, until the client closes too or time is up.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop, self._ended = transport, loop, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._ended or self._transport.is_closing()

    def close(self) -> None:
        if not self.is_closing():
            self._ended = True
            try:
                self._transport.write_eof()  # after what is still to be sent
            except OSError:  # the client has reset the connection
                self._transport.abort()
            else:
                self._transport.resume_reading()
                self._linger()

    def _linger(self, unsent: int = -1) -> None:
        """Give a client more time while it takes what is to be sent."""
        left = self._transport.get_write_buffer_size()
        if left == unsent:
            self._transport.abort()
        else:
            self._loop.call_later(LINGER_TIMEOUT, self._linger, left)


class PromptProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with an end to waiting for clients.

    uvicorn limits the silence between two requests, but not the time that one takes to arrive: a client that sends half of it,
    or a byte now and then, would keep its socket for good, and keep the server from shutting down.
    """

    _half_closed = False  # the client sends no more

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(LingeringTransport(transport, self.loop))
        self._deadline = self.loop.call_later(REQUEST_TIMEOUT, self._late)
        if len(self.connections) > MOST_CONNECTIONS:
            self._refuse(503, f"more than {MOST_CONNECTIONS} connections; try again")

    def connection_lost(self, error: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)

    def eof_received(self) -> bool:
        """Whether the connection stays open: a client that sends no more may be gone, or still wait for its answer."""
        self._give_up(400, "the request ends too early")
        self._half_closed, self.timeout_keep_alive = True, 0
        self._await_request()
        return not self.transport.is_closing()

    def on_response_complete(self) -> None:
        self._await_request()
        super().on_response_complete()

    def send_400_response(self, message: str) -> None:
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)  # uvicorn calls this where it catches h11's error
        self._refuse(status, f"the headers have more than {LARGEST_HEADERS} bytes" if status == 431 else message)

    def timeout_keep_alive_handler(self) -> None:
        self._late()

    def shutdown(self) -> None:
        self._give_up(503, SHUTTING_DOWN)
        if not self.transport.is_closing():
            super().shutdown()

    def _await_request(self) -> None:
        self._deadline.cancel()
        self._deadline = self.loop.call_later(REQUEST_TIMEOUT, self._late)

    def _late(self) -> None:
        within = "be answered, for its client sends no more" if self._half_closed else "arrive"
        self._give_up(408, f"a request has {REQUEST_TIMEOUT} s to {within}")

    def _give_up(self, status: int, message: str) -> None:
        """Close the connection, unless its client has sent a whole request and is there to read the answer."""
        client = self.conn.their_state
        if self.transport.is_closing() or (client not in (h11.IDLE, h11.SEND_BODY) and not self._half_closed):
            return
        if client is not h11.IDLE or self.conn.trailing_data[0]:  # a request has begun
            self._refuse(status, message)
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer in the application's place, unless it has answered, and close."""
        if self.cycle is not None:  # the application, if it waits for the body or is about to answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"detail": message}).encode()
            headers = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
            headers |= RETRY_SOON if status == 503 else {}
            lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {headers[name]}" for name in headers)]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
