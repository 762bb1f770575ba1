"""The vision side: SigLIP tower, pixel shuffle and connector to the language model."""
