"""`python -m benchmarks.gates`: see figures.py."""

import sys

from .figures import main

sys.exit(main())
