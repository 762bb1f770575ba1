"""Answers to held-out questions, their scores, and the text-only baseline."""
