"""From plans to weights: batches, the loader that reads them ahead, the loop that trains, checkpoints, and the answers of the result."""
