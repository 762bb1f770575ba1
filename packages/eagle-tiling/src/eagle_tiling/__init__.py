"""Which grid of tiles an image gets (Image Area Preservation), and the tiles: numpy and Pillow only."""

__version__ = "0.1.0"
