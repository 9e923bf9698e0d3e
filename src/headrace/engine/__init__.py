"""Engines: token ids in, token ids out. Must not know HTTP, text, or where other replicas are."""
