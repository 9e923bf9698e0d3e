"""`python -m headrace.engine --fd N --spec JSON`: one engine process."""

from __future__ import annotations

from headrace.engine.process import main
from headrace.lifetime import exit_whole

exit_whole(main)  # grammars may be compiled meanwhile
