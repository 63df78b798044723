"""`python -m mmtx` is the command `mmtx`."""

from mmtx.cli import main

main()
