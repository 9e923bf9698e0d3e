"""`python -m headrace.engine --fd N --spec JSON`: one engine process."""

from __future__ import annotations

import sys

from headrace.engine.process import main

sys.exit(main())
