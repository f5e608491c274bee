"""Training runs: settings, plan, training, and the folder they leave."""
