"""Training data: shards, loaders, transforms, stored teacher embeddings."""
