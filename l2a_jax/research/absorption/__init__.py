"""Routing absorption (arXiv 2603.02227): a 31M transformer with gated attention, and the experiments with controls."""
