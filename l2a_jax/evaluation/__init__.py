"""Evaluation: what a trained run can do, beside the controls that say why."""
