"""Measurements of minisd beside its peers: one subject a file, and a peer is one small function in it.

Every contender runs in a process of its own, so that its peak of memory is its own, and all of them take turns, so that
a machine's other work disturbs them alike. What they compute is compared: speed is never bought with a wrong result.
"""
