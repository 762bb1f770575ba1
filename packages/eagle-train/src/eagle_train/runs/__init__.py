"""Runs: the folder of a run and its resume rules, training it, evaluating, exporting and chatting with its result."""
