"""Training: which leaves (`regimes`), on what (`loss`), how (`step`, `loop`), and what is kept (`checkpoint`)."""
