"""Context-parallel attention for packed sequences, exact in every gradient, on stock PyTorch."""

from eagle_cp.attention import attention
from eagle_cp.cached import cached_attention
from eagle_cp.hugging_face import register_attention
from eagle_cp.layout import Layout
from eagle_cp.mesh import ContextMesh
from eagle_cp.planner import ContextPlan, explain, plan_context
from eagle_cp.tiles import TilePlan, exchange_tiles, plan_tiles

__all__ = [
    "ContextMesh",
    "ContextPlan",
    "Layout",
    "TilePlan",
    "attention",
    "cached_attention",
    "exchange_tiles",
    "explain",
    "plan_context",
    "plan_tiles",
    "register_attention",
]

__version__ = "0.1.0"
