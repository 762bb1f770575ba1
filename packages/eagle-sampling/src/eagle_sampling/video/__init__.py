"""Videos: what a file holds (`probe`) and frames by presentation time (`read`)."""
