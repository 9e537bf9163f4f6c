"""Entry point: `deepspeed gear_trainer/run.py --config FILE [key=value ...]`, or `torchrun ... -m gear_trainer.run`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # a launcher puts this folder first: our config.py or cli.py would shadow other packages' modules

from gear_trainer.cli import launched as main

if __name__ == "__main__":
    sys.exit(main())
