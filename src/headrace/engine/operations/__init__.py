"""Fused operations behind one small interface, with a plain torch reference."""
