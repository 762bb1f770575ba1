"""What a run tells people: metrics, plots, and pictures of samples and packs."""
