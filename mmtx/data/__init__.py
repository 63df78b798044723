"""From files to samples to packed batches: reads manifests, folders and shards, and loads pictures and sounds."""
