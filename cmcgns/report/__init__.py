"""The report of pretraining runs: one page with their curves, settings and pictures, also of several side by side."""
