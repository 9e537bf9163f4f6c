"""Rank script: a short run whose references are the policy's own for two steps and an endpoint's (WRITER_URL) from then on."""

import faulthandler
import os
import sys

from gear_trainer.endpoint import connect
from gear_trainer.run import main
from gear_trainer.trainer import Trainer

faulthandler.dump_traceback_later(1000, exit=True)
write = Trainer._write_references


def change_writer(self, step, rollouts, sums):
    if step == 3:
        url = os.environ["WRITER_URL"]
        self.writer.model = connect(self.cfg.writer.model_copy(update={"url": url, "max_retries": 0}), 1024)
    write(self, step, rollouts, sums)


Trainer._write_references = change_writer
sys.exit(main(sys.argv[1:]))
