"""Several processes that run one program: they meet, they agree, and none waits for one that is gone.

XLA's runtime (`jax.distributed`) joins the devices of all processes into one mesh. When a process dies, though, it
aborts the others with a C++ trace, or lets them wait for minutes. So a small protocol of our own stands before it, JSON
lines over TCP. Process 0 listens at the coordinator's address; each other process holds one connection to it, the
lifeline, over which they compare what must be equal and say why they end. A lifeline that breaks means a death: known
at once when a process is killed, within half a minute when its host loses power. The connections of `jax.distributed`
go through the same port: a relay in each process holds them open while the process says its one line.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

GRACE = 3.0  # seconds that a process which lost another has to say by itself what went wrong
GREETING = 10.0  # seconds that a connection has to say who it is
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # a silent host is dead after 30 s


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


class Group:
    """What a process knows of the others. This one is alone."""

    id, num = 0, 1

    def __init__(self, who: str = ""):
        self.who = who  # how its lines begin

    def agree(self, facts: dict[str, Any]) -> None:
        """Compares facts that must be the same in all processes; ValueError, in every one, says what differs."""

    def lost(self) -> str | None:
        """Why the group cannot go on, if another process is gone: asked when something failed that others share."""
        return None

    def leave(self, code: int) -> int:
        """The end of a run that went well, or that all processes ended together."""
        return code

    def fail(self, code: int, line: str) -> int:
        """The end of this process, which says why; the others end too."""
        if line:
            say(self.who + line)
        return code


class Together(Group):
    """A group of several processes; process 0 is in the middle."""

    def __init__(self, id: int, num: int, lines: dict[int, Line], address: str):
        super().__init__(f"process {id}: ")
        self.id, self.num, self.address = id, num, address
        self._lines = lines
        self._inbox: dict[int, queue.SimpleQueue] = {i: queue.SimpleQueue() for i in lines}
        self._lock = threading.Lock()
        self._leaving = False  # from here on a lifeline that ends is no death
        self._gone = threading.Event()
        self._why = ""
        for i in lines:
            threading.Thread(target=self._listen, args=(i,), daemon=True).start()

    def agree(self, facts: dict[str, Any]) -> None:
        """Compares facts that must be the same in all processes; ValueError, in every one, says what differs."""
        facts = json.loads(json.dumps(facts))
        if self.id == 0:
            differs = None
            for i, inbox in self._inbox.items():
                theirs = inbox.get()["facts"]
                names = [name for name in facts | theirs if facts.get(name) != theirs.get(name)]
                if names and not differs:
                    differs = {"process": i, "name": names[0], "facts": [facts.get(names[0]), theirs.get(names[0])]}
            self._tell(differs=differs)
        else:
            self._tell(facts=facts)
            differs = self._inbox[0].get()["differs"]
        if differs:
            ours, theirs = (json.dumps(fact) for fact in differs["facts"])
            who = "here" if differs["process"] == self.id else f"in process {differs['process']}"
            zero = "here" if self.id == 0 else "in process 0"
            raise ValueError(f"{differs['name']}: {theirs} {who}, {ours} {zero}: start every process with the same")

    def lost(self) -> str | None:
        """Why the group cannot go on, if another process is gone: asked when something failed that others share."""
        return self._why if self._gone.wait(GRACE) else None

    def leave(self, code: int) -> NoReturn:
        """Waits until all are done, and exits."""
        if self.id == 0:
            for inbox in self._inbox.values():
                inbox.get()
            self._close()
            self._tell(done=True)
        else:
            self._tell(done=True)
            self._inbox[0].get()
            self._close()
        quit_now(code)

    def fail(self, code: int, line: str) -> NoReturn:
        """Says why this process ends, to the others too, and exits."""
        if not self._close():
            time.sleep(GRACE)  # the line of the one that is gone is being said
        line = line.strip() or "nobody reads any more"
        self._tell(ended=f"process {self.id} ended: {line.splitlines()[-1]}", code=code)
        say(self.who + line)
        quit_now(code)

    def _close(self) -> bool:
        """Ends the watch; False when another thread has ended it."""
        with self._lock:
            first, self._leaving = not self._leaving, True
        return first

    def _tell(self, **message: Any) -> None:
        for line in self._lines.values():
            line.send(message)

    def _listen(self, i: int) -> None:
        """Reads what one process says, for as long as it lives."""
        while (message := self._lines[i].receive()) is not None:
            if "ended" in message:
                self._lose(message["ended"], message["code"])
            else:
                self._inbox[i].put(message)
        self._lose(f"process {i} died, or its connection did: without it the others cannot go on", 1)

    def _lose(self, why: str, code: int) -> None:
        """Another process is gone: so goes this one, if it does not end by itself."""
        with self._lock:
            if self._leaving or self._gone.is_set():
                return
            self._why = why
            self._gone.set()
        if self.id == 0:
            self._tell(ended=why, code=code)
        time.sleep(GRACE)
        if self._close():
            say(self.who + why)
            quit_now(code)


def quit_now(code: int) -> NoReturn:
    """Exits without the teardown of `jax.distributed`, which waits for processes that may be gone, and then aborts."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- how they meet -------------------------------------------------------------------------------------------------


class Line:
    """A connection that carries JSON, one object a line."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._lock = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):  # not everywhere by these names
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict[str, Any]) -> None:
        """Sends, if anybody is there: who is not is missed by the one who reads."""
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next object; None when there is none any more, or something else. Takes no byte behind it."""
        line = b""
        while not line.endswith(b"\n"):
            try:
                byte = self.socket.recv(1)
            except OSError:
                return None
            if not byte or len(line) > 2**20:
                return None
            line += byte
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            return message if isinstance(message, dict) else None
        return None


def meet(address: str, num: int, id: int, timeout: float) -> Together:
    """Waits for all processes, at most `timeout` seconds; ValueError when one does not come or does not belong."""
    return host(address, num, timeout) if id == 0 else visit(address, num, id, timeout)


def host(address: str, num: int, timeout: float) -> Together:
    """Process 0: listens, and waits for the others."""
    service, hellos = free_port(), queue.SimpleQueue()
    listener = listen(address)
    threading.Thread(target=receive_all, args=(listener, service, hellos), daemon=True).start()
    lines: dict[int, Line] = {}
    wrong = ""
    for seconds in remaining(timeout):
        if len(lines) == num - 1 or wrong:
            break
        with contextlib.suppress(queue.Empty):
            line, hello = hellos.get(timeout=min(seconds, 0.2))
            id = hello["process"]
            if hello["num"] != num:
                wrong = f"--num-processes is {hello['num']} in process {id} but {num} in process 0: give all the same"
            elif id in lines:
                wrong = f"two processes have --process-id {id}: give each its own"
            lines[id if id not in lines else -1] = line
    missing = [str(i) for i in range(1, num) if i not in lines]
    if missing and not wrong:
        which = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(missing)}"
        wrong = f"{which} of {num} did not come to {address} within {timeout:g} s: start all of them"
    for line in lines.values():
        line.send({"refused": wrong} if wrong else {"welcome": True})
    if wrong:
        raise ValueError(wrong)
    return Together(0, num, dict(sorted(lines.items())), f"127.0.0.1:{service}")


def visit(address: str, num: int, id: int, timeout: float) -> Together:
    """Any other process: connects, and waits until all are there."""
    failure: OSError | None = None
    place = split(address)
    begin = time.monotonic()
    for seconds in remaining(timeout):
        try:
            line = Line(socket.create_connection(place, timeout=max(seconds, 0.1)))
            break
        except OSError as error:
            failure = error
            time.sleep(min(0.2, seconds))
    else:
        why = failure.strerror or str(failure) if failure else "no answer"
        raise ValueError(
            f"coordinator {address} could not be reached within {timeout:g} s ({why}): start process 0 there"
        )
    line.send({"process": id, "num": num})
    line.socket.settimeout(timeout + GREETING)  # process 0 may have begun to wait just now
    answer = line.receive()
    if answer is None or not answer.keys() & {"welcome", "refused"}:
        waited = time.monotonic() - begin
        raise ValueError(f"coordinator {address} gave no answer in {waited:.0f} s: is it process 0 of this program?")
    if "refused" in answer:
        raise ValueError(answer["refused"])
    line.socket.settimeout(None)
    relay = socket.create_server(("127.0.0.1", 0))
    group = Together(id, num, {0: line}, f"127.0.0.1:{relay.getsockname()[1]}")
    threading.Thread(target=relay_all, args=(relay, place), daemon=True).start()
    return group


def remaining(timeout: float) -> Iterator[float]:
    """The seconds that are left, until there are none."""
    end = time.monotonic() + timeout
    while (left := end - time.monotonic()) > 0:
        yield left


def split(address: str) -> tuple[str, int]:
    """ "host:port" -> (host, port); ValueError for anything else."""
    name, _, port = address.rpartition(":")
    if not name or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"coordinator {address!r} is no address: write HOST:PORT, such as 10.0.0.1:8476")
    return name.removeprefix("[").removesuffix("]"), int(port)


def listen(address: str) -> socket.socket:
    """A socket at this address where it is this machine's own, else at all addresses of this machine.

    A name is not looked up: it may stand for a loopback address here and for another one elsewhere.
    """
    name, port = split(address)
    name = "127.0.0.1" if name == "localhost" else name
    try:
        with contextlib.suppress(ValueError):
            family = socket.AF_INET6 if ipaddress.ip_address(name).version == 6 else socket.AF_INET
            try:
                return socket.create_server((name, port), family=family)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
        dual = socket.has_dualstack_ipv6()
        return socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(f"coordinator {address} cannot be listened at ({why}): take another port") from None


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


# --- what the coordinator's port carries ---------------------------------------------------------------------------


def receive_all(listener: socket.socket, service: int, hellos: queue.SimpleQueue) -> None:
    """Process 0's door: lifelines are put in `hellos`, relays are led on to the port of `jax.distributed`."""

    def greet(connection: socket.socket) -> None:
        connection.settimeout(GREETING)
        line = Line(connection)
        hello = line.receive() or {}
        connection.settimeout(None)
        if "relay" in hello:
            with contextlib.suppress(OSError):
                bridge(connection, ("127.0.0.1", service))
        elif {"process", "num"} <= hello.keys():
            hellos.put((line, hello))
        else:
            connection.close()

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=greet, args=(connection,), daemon=True).start()


def relay_all(listener: socket.socket, place: tuple[str, int]) -> None:
    """Another process's door for its own `jax.distributed`: leads each connection on to process 0."""
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=bridge, args=(connection, place, True), daemon=True).start()


def bridge(near: socket.socket, place: tuple[str, int], relay: bool = False) -> None:
    """Joins a connection with a new one to `place`, in both directions.

    relay: `near` stays open when the far end is closed, so that `jax.distributed` does not abort this process.
    """
    far = None
    while far is None:  # process 0's service may not listen yet
        with contextlib.suppress(OSError):
            far = socket.create_connection(place)
        if far is None:
            time.sleep(0.1)
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if relay:
        Line(far).send({"relay": True})
    threading.Thread(target=pump, args=(near, far, True), daemon=True).start()
    pump(far, near, not relay)


def pump(source: socket.socket, target: socket.socket, close: bool) -> None:
    """Carries bytes until there are no more; `close` then closes the target too."""
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    if close:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
