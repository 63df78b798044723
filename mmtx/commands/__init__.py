"""The commands of `mmtx` except those that train, one file each: `add` declares the arguments, `run` imports what it needs."""
