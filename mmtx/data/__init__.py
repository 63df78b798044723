"""From files to samples: manifests, folders and shards are read here, pictures and sounds are loaded here."""
