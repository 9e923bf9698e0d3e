"""Decoder architectures in torch."""
