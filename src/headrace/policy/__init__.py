"""Pure decisions: observation and now_s in, decision and reason out. Must not know I/O or clocks."""
