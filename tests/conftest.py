"""No test may open a socket beyond loopback, in this process or in its children's environment."""

import os
import socket

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DO_NOT_TRACK="1")
# The networks of the tests are tiny: a second thread waits longer than it works. Set before torch is imported; the
# large ones (-m full) may be given OMP_NUM_THREADS.
os.environ.setdefault("OMP_NUM_THREADS", "1")
LOOPBACK = ("127.", "::1", "localhost")


class NetworkUsed(AssertionError):
    """A test tried to reach the network."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
            raise NetworkUsed(f"connection to {address}")
        return connect(self, address)

    def resolve(host, *args, **kwargs):
        if host is not None and not str(host).startswith(LOOPBACK):
            raise NetworkUsed(f"look-up of {host}")
        return getaddrinfo(host, *args, **kwargs)

    getaddrinfo = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
