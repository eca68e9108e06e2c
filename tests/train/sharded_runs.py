"""A rank that trains several runs one after the other: their command lines are the lines of a file of JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llava.train.distributed import leave_process_group
from llava.train.train import main

if __name__ == "__main__":
    for words in json.loads(Path(sys.argv[1]).read_text()):
        main(words)
    leave_process_group()
