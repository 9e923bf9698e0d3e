"""Blocks of key and value memory: who holds them, and which are shared by prefix. Pure: ids, no tensors."""
