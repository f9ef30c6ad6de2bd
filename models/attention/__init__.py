from models.attention.backends import BACKENDS, attend, require_backend
from models.attention.layer import AttentionLayer, Modulation
from models.attention.multi_head import Context, MultiHeadAttention

__all__ = ["BACKENDS", "AttentionLayer", "Context", "Modulation", "MultiHeadAttention", "attend", "require_backend"]
