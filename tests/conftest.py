"""What all tests rely on."""

from __future__ import annotations

import signal

# Children inherit an ignored SIGINT, as a shell gives it to what it runs in the background; then Ctrl-C,
# which several tests press, would do nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
