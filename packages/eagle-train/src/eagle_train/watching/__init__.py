"""Views of a run for people: progress, plots, and pictures of samples and packs."""
