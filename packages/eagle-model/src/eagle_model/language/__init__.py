"""The language model: one decoder for the dense families in `spec.py`, under their Hugging Face names."""
