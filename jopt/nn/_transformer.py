"""A causal transformer over characters, its layers stacked and scanned."""

from typing import Any

import jax
from flax import linen

_init = jax.nn.initializers


class CharTransformer(linen.Module):
    """Predicts each next token from those before it: a pre-normalized causal transformer.

    Tokens `[batch, time]`, integers below `vocab`, become logits `[batch, time, vocab]`. One
    `jax.lax.scan` runs over the layers, so every layer's parameter is a slice of a stacked one
    (`layers/...`, leading axis `layers`) and the program does not grow with their number. In
    training (`train=True`) dropout needs a key: `rngs={"dropout": key}`.

    Attributes:
      vocab: different tokens.
      layers: how many.
      width: size of the residual stream.
      heads: attention heads, a divisor of `width`.
      context: the longest `time`; each place has a learned position.
      dropout: fraction dropped of the embeddings and of what each half layer adds.
      tied: whether the logits use the embedding instead of a matrix of their own.
      gated: the parts of LLaMA's layers instead of GPT's: norms by the root of the mean square,
        without a mean; a perceptron `down(silu(gate(x)) * up(x))` with `8 / 3 width` hidden
        channels, up to a multiple of 8; no biases. About as many parameters.

    References:
      Ashish Vaswani et al.: Attention Is All You Need, 2017, arXiv:1706.03762.
      Ruibin Xiong et al.: On Layer Normalization in the Transformer Architecture, 2020,
      arXiv:2002.04745.
      Biao Zhang, Rico Sennrich: Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.
      Noam Shazeer: GLU Variants Improve Transformer, 2020, arXiv:2002.05202.
      Hugo Touvron et al.: LLaMA: Open and Efficient Foundation Language Models, 2023,
      arXiv:2302.13971.
    """

    vocab: int
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    dropout: float = 0.0
    tied: bool = False
    gated: bool = False

    @linen.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits of the next token at every place."""
        if self.width % self.heads:
            raise ValueError(
                f"`CharTransformer(width={self.width}, heads={self.heads})`: the heads share the "
                "width evenly. Choose a multiple of `heads`."
            )
        if tokens.ndim != 2 or tokens.shape[1] > self.context:
            raise ValueError(
                f"`CharTransformer(context={self.context})` expects tokens `[batch, time]`, "
                f"`time` at most {self.context}; got shape {tokens.shape}."
            )
        embed = linen.Embed(
            self.vocab, self.width, embedding_init=_init.normal(0.02), name="tokens"
        )
        places = self.param("positions", _init.normal(0.02), (self.context, self.width))
        x = embed(tokens) + places[None, : tokens.shape[1]]
        x = linen.Dropout(self.dropout, deterministic=not train)(x)
        scanned = linen.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.layers,
        )
        layer = scanned(self.heads, self.dropout, self.layers, self.gated, train, name="layers")
        x, _ = layer(x, None)
        x = _norm(self.gated, name="norm")(x)
        if self.tied:
            return embed.attend(x)
        return linen.Dense(self.vocab, use_bias=not self.gated, name="head")(x)


class _Layer(linen.Module):
    """Attention, then a two-layer perceptron, each on the normalized stream and added to it."""

    heads: int
    dropout: float
    layers: int
    gated: bool
    train: bool

    @linen.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        batch, time, width = x.shape
        # Each layer adds twice to the stream: started so that their sum keeps its variance.
        shrunk = _init.variance_scaling(1 / (2 * self.layers), "fan_in", "truncated_normal")

        def dropped(x: jax.Array) -> jax.Array:
            return linen.Dropout(self.dropout, deterministic=not self.train)(x)

        def dense(features: int, *, bias: bool = not self.gated, **kwargs: Any) -> linen.Dense:
            return linen.Dense(features, use_bias=bias, **kwargs)

        normed = _norm(self.gated, name="attention_norm")(x)
        query, key, value = (
            dense(width, bias=False, name=name)(normed).reshape(
                batch, time, self.heads, width // self.heads
            )
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="xla"
        )
        mixed = mixed.reshape(batch, time, width)
        x = x + dropped(dense(width, kernel_init=shrunk, name="out")(mixed))
        normed = _norm(self.gated, name="mlp_norm")(x)
        if self.gated:
            hidden = -(-8 * width // 24) * 8
            gate = jax.nn.silu(dense(hidden, name="gate")(normed))
            inner = gate * dense(hidden, name="up")(normed)
        else:
            inner = jax.nn.gelu(dense(4 * width, name="up")(normed))
        return x + dropped(dense(width, kernel_init=shrunk, name="down")(inner)), None


def _norm(gated: bool, *, name: str) -> linen.Module:
    return linen.RMSNorm(name=name) if gated else linen.LayerNorm(name=name)
