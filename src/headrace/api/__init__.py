"""The contracts: wire types of the HTTP API, messages between processes, and the config tree.

Owns the words that processes say to each other. Must not know who says them, nor any I/O.
"""
