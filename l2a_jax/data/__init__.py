"""Text to batches: recipes and files, a token store, packing, mixing, and random access by micro-batch index."""
