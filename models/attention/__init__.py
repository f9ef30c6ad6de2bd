from models.attention.backends import BACKENDS, attend, require_backend
from models.attention.layer import AttentionLayer, Modulation, Modulations
from models.attention.multi_head import Context, MultiHeadAttention

__all__ = [
    "BACKENDS",
    "AttentionLayer",
    "Context",
    "Modulation",
    "Modulations",
    "MultiHeadAttention",
    "attend",
    "require_backend",
]
