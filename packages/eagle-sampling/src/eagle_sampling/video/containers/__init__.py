"""Parsers of video containers: one file each, all returning a `Track`. libavformat (`demux`) reads what they do not support."""
