"""Work for processes of benchmarks/side_by_side.py, in a module that starts in no time."""

import os
import time


def halved(device: str, number: int) -> tuple[str, str, int]:
    """6 / number on a device; 0 fails, 13 ends the process, and more than 100 never ends."""
    if number == 13:
        os._exit(3)
    if number > 100:
        time.sleep(600)
    return device, os.environ["OMP_NUM_THREADS"], 6 // number
