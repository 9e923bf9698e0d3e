"""Launchers: start, stop and watch processes. Must not know what the processes do."""
