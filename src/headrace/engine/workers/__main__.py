"""`python -m headrace.engine.workers --fd N`: one rank of an engine, started by the engine."""

from __future__ import annotations

import sys

from headrace.engine.workers.rank import main

sys.exit(main())
