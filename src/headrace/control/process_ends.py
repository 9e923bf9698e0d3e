"""How an ended process ended, for people. Pure. Must not know who started it, or what follows."""

from __future__ import annotations

from headrace.api.messages import ProcessState


def describe_end(process: ProcessState) -> str:
    """Say with which exit code or signal it ended, and its last line of output."""
    code = process.exit_code
    if code is None and process.last_output:
        return process.last_output  # it was not seen to end: what held it is gone
    if code is not None and code < 0:
        ending = f"ended by signal {-code}"
    else:
        ending = f"exited with {code}"
    last_line = process.last_output.splitlines()[-1].strip() if process.last_output else ""
    return f"{ending}: {last_line}" if last_line else ending
