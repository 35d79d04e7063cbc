"""The last layer at answer positions only.

The loss and the scores read the last hidden states where they predict an answer token, a few positions of a row. There
the last layer's query, attention output and feed-forward part are needed; its keys and values are needed everywhere.
The rest of that layer is not computed: with adapters on the last 8 layers that is most of one layer in eight.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from lori_nb.lab.text import Batch

# Architectures whose layers are Llama's: normed attention and normed MLP, each added to its input.
ARCHITECTURES = ("llama", "mistral")


def can_narrow(body: nn.Module) -> bool:
    """Whether the body's last layer can be computed at some positions alone."""
    config = body.config
    return config.model_type in ARCHITECTURES and getattr(config, "sliding_window", None) is None


def narrowed(body: nn.Module, batch: Batch) -> nn.Module:
    """A body that shares all modules with ``body`` and whose last hidden states are (b × m × d): those at
    ``batch.asked`` (b × m).
    """
    twin = copy.copy(body)
    twin._modules = dict(body._modules)
    twin.layers = nn.ModuleList([*body.layers[:-1], _LastLayer(body.layers[-1], batch.asked)]).eval()
    return twin


class _LastLayer(nn.Module):
    """A decoder layer that takes all positions in and gives some of them out."""

    def __init__(self, layer: nn.Module, asked: Tensor):
        super().__init__()
        self.layer, self.asked = layer, asked

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_,
    ) -> Tensor:
        """(b × L × d) → (b × m × d)."""
        layer = self.layer
        normed = layer.input_layernorm(hidden_states)
        hidden = _at(hidden_states, self.asked) + self._attention(normed, attention_mask, position_embeddings)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def _attention(self, normed: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor]) -> Tensor:
        attention, asked = self.layer.self_attn, self.asked

        def heads(states: Tensor) -> Tensor:  # (b × positions × heads·d_h) → (b × heads × positions × d_h)
            return states.view(*states.shape[:2], -1, attention.head_dim).transpose(1, 2)

        cos, sin = (each.expand(len(normed), -1, -1) for each in rotation)
        query = _rotated(heads(attention.q_proj(_at(normed, asked))), _at(cos, asked), _at(sin, asked))
        key = _rotated(heads(attention.k_proj(normed)), cos, sin)
        value = heads(attention.v_proj(normed))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        out, _ = attend(
            attention, query, key, value, _rows(mask, asked, normed), dropout=0.0, scaling=attention.scaling
        )
        return attention.o_proj(out.reshape(len(normed), asked.shape[1], -1))


def _at(states: Tensor, asked: Tensor) -> Tensor:
    """States (b × L × d) at positions (b × m) → (b × m × d)."""
    return states.gather(1, asked.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _rows(mask: Tensor | None, asked: Tensor, normed: Tensor) -> Tensor:
    """What each asked position may attend to (b × 1 × m × L), of a mask (b × 1 × L × L) or, without one, causal."""
    length = normed.shape[1]
    if mask is None:
        return (torch.arange(length, device=asked.device) <= asked.unsqueeze(-1)).unsqueeze(1)
    return mask.expand(len(asked), -1, -1, -1).gather(2, asked[:, None, :, None].expand(-1, mask.shape[1], -1, length))


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return states * cos + rotate_half(states) * sin
