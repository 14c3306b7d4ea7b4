"""The graph of encoders in MLX: BERT and its relatives, ModernBERT, gte, nemotron-rerank."""

from __future__ import annotations

from qrank.backends.mlx_graph import Array, Graph


class Encoder(Graph):
    """A cross-encoder with a head of one label."""

    def __call__(self, ids: Array, lengths: Array, types: Array | None) -> Array:
        """Logits, fp32 of shape [batch].

        Args:
            ids: token ids, padded on the right, int32 [batch, length].
            lengths: tokens of each sequence, int32 [batch].
            types: token types, like `ids`; None: every token has type 0.
        """
        mx, weights = self._mx, self.weights
        hidden = self.embedded(ids)
        if "types" in weights:
            hidden = hidden + weights.lookup(
                mx.zeros_like(ids) if types is None else types, "types"
            )
        places = mx.arange(ids.shape[1])
        if "positions" in weights:
            hidden = hidden + weights.lookup(places, "positions")
        if "embeddings" in weights:
            hidden = weights.norm(hidden, "embeddings")
        if "projection" in weights:
            hidden = weights.product(hidden, "projection")
        valid = places < lengths[:, None]
        mean = self.about["pooling"] == "mean"
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            mask = self._mask(valid, layer["window"])
            at = None
            if number == last and not mean:
                mask, at = mask[:, :, :1], mx.zeros_like(lengths)
            hidden, _ = self.layer(hidden, number, mask, at=at)
        if "final" in weights:
            hidden = weights.norm(hidden, "final")
        if not mean:
            return self.scored(hidden[:, 0])
        hidden = hidden.astype(mx.float32) * valid[..., None]
        return self.scored(hidden.sum(1) / lengths[:, None])

    def _mask(self, valid: Array, window: int | None) -> Array:
        """What tokens see, bool of shape [batch, 1, length or 1, length].

        Args:
            valid: what is no padding, bool [batch, length].
            window: the largest distance that a token sees; None: there is none.
        """
        mx, length = self._mx, valid.shape[1]
        if window is None or length <= window + 1:
            return valid[:, None, None]
        places = mx.arange(length)
        distance = mx.abs(places[:, None] - places)
        # Padding whose window holds nothing else sees itself: a softmax over nothing may give NaN,
        # which even a weight of 0 would spread.
        return ((distance <= window) & (valid[:, None] | (distance == 0)))[:, None]
