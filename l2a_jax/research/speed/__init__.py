"""Attention, steps and inference timed beside their peers."""
