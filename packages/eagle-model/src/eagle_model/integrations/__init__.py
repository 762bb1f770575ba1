"""Plugins for other programs: vLLM, lmms-eval and VLMEvalKit. Each module is imported by the program that it extends, never by Eagle."""
