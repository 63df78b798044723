"""The commands of `mmtx`, but those that train, a file each: `add` says what arguments there are, and `run` imports what it needs."""
