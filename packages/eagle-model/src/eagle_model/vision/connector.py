"""Pixel shuffle and the connector (`mlp1`), which turn hidden states of the vision tower into visual tokens.

Shapes: N tiles, h x w patches a tile, c channels, H hidden size of the language model.
"""

from torch import Tensor, nn


def pixel_shuffle(x: Tensor, factor: float) -> Tensor:
    """Join neighbouring patches: [N, h, w, c] -> [N, h * factor, w * factor, c / factor^2]. factor: 1/n, n dividing h and w.

    The channel order is that of InternVL's second version: each token holds the rows of its block one after the other.
    """
    n, h, w, c = x.shape
    side = round(1 / factor)
    x = x.reshape(n, h, w // side, c * side).permute(0, 2, 1, 3)
    x = x.reshape(n, w // side, h // side, c * side**2)
    return x.permute(0, 2, 1, 3)


def make_connector(width: int, hidden_size: int, layers: int) -> nn.Sequential:
    """`mlp1`: LayerNorm, Linear, exact GELU, Linear (2 layers), or one Linear."""
    if layers == 2:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
    if layers == 1:
        return nn.Sequential(nn.Linear(width, hidden_size))
    raise ValueError(f"mlp_connector_layers is {layers}; it must be 1 or 2")
