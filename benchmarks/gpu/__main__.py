"""`python -m benchmarks.gpu`: see report.py."""

import sys

from .report import main

sys.exit(main())
