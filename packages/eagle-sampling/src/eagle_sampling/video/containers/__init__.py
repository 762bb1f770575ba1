"""Parsers of video containers: one file each, all giving a `Track`. libavformat (`demux`) reads what they pass on."""
