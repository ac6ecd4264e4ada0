"""A causal transformer over characters, its layers stacked and scanned."""

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

    References:
      Ashish Vaswani et al.: Attention Is All You Need, 2017, arXiv:1706.03762.
      Ruibin Xiong et al.: On Layer Normalization in the Transformer Architecture, 2020,
      arXiv:2002.04745.
    """

    vocab: int
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    dropout: float = 0.0
    tied: bool = False

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
        layer = scanned(self.heads, self.dropout, self.layers, train, name="layers")
        x, _ = layer(x, None)
        x = linen.LayerNorm(name="norm")(x)
        return embed.attend(x) if self.tied else linen.Dense(self.vocab, name="head")(x)


class _Layer(linen.Module):
    """Attention, then a two-layer perceptron, each on the normalized stream and added to it."""

    heads: int
    dropout: float
    layers: int
    train: bool

    @linen.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        batch, time, width = x.shape
        # Each layer adds twice to the stream: started so that their sum keeps its variance.
        shrunk = _init.variance_scaling(1 / (2 * self.layers), "fan_in", "truncated_normal")

        def dropped(x: jax.Array) -> jax.Array:
            return linen.Dropout(self.dropout, deterministic=not self.train)(x)

        normed = linen.LayerNorm(name="attention_norm")(x)
        query, key, value = (
            linen.Dense(width, use_bias=False, name=name)(normed).reshape(
                batch, time, self.heads, width // self.heads
            )
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="xla"
        )
        mixed = mixed.reshape(batch, time, width)
        x = x + dropped(linen.Dense(width, kernel_init=shrunk, name="out")(mixed))
        normed = linen.LayerNorm(name="mlp_norm")(x)
        hidden = jax.nn.gelu(linen.Dense(4 * width, name="up")(normed))
        return x + dropped(linen.Dense(width, kernel_init=shrunk, name="down")(hidden)), None
