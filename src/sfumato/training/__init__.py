"""Training: data, the one trainer, its checkpoints and reports, and the recipes that it runs."""
