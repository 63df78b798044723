"""`python -m mmtx` is the command `mmtx`."""

import os
import sys

import mmtx

# Python looks in the current directory first, where a user's `yaml.py` may lie; the command `mmtx` does not look there.
if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):
    here = sys.path.pop(0)
    if os.path.dirname(os.path.dirname(os.path.abspath(mmtx.__file__))) == os.path.abspath(here):
        sys.path.append(here)  # a clone that is not installed, which our child processes must find

from mmtx.cli import main

main()
