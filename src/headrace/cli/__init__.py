"""Argument parsing and terminal output only. Nothing imports it."""
