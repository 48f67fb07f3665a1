"""Benchmarks of minisd beside its peers: one subject per file, each contender one small function in it.

Every contender runs in a process of its own, so that its peak memory is its own, and all take turns, so that other load
on the machine disturbs them alike. Their results are compared: speed is never bought with a wrong result.
"""
