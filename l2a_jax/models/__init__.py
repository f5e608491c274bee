"""Qwen2.5 with conditional attention: `params` says what the tree holds, `qwen2` runs it."""
