"""`python -m benchmarks.page`: see performance_page.py."""

import sys

from .performance_page import main

sys.exit(main())
