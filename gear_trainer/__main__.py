"""`python -m gear_trainer COMMAND ...`: see cli.py."""

import sys

from gear_trainer.cli import main

sys.exit(main())
