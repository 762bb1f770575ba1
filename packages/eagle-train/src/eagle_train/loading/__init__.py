"""Packs read ahead of the step by processes. Nothing here imports torch (import contract)."""
