"""From recipes and rows to facts: what is read, what it measures, and what could not be used."""
