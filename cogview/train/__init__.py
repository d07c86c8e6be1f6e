"""Training: one loop for everything that is trained, its optimizer, schedule, checkpoints and log."""
