"""Experiments over the library: the replication on real weights, routing absorption, and speed. Nothing imports it."""
