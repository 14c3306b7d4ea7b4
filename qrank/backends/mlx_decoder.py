"""The graph of decoders in MLX: Qwen2 and 3, Llama, Mistral, Gemma."""

from __future__ import annotations

from collections.abc import Sequence

from qrank.backends.mlx_graph import Array, Graph, KeysValues


class Decoder(Graph):
    """A causal model that scores at its last token, after a prefix that was read before.

    It needs no padding mask: tokens do not see the padding on their right.
    """

    def read(self, ids: Array) -> list[KeysValues]:
        """Each layer's keys and values of a prefix, int32 [1, length]."""
        return self._through(ids, (), None)[1]

    def __call__(self, ids: Array, lengths: Array, before: Sequence[KeysValues]) -> Array:
        """Logits, fp32 of shape [batch].

        Args:
            ids: token ids after the prefix, padded on the right, int32 [batch, length].
            lengths: tokens of each sequence, int32 [batch].
            before: from `read`; empty: there is no prefix.
        """
        hidden, _ = self._through(ids, before, lengths - 1)
        return self.scored(self.weights.norm(hidden[:, 0], "final"))

    def _through(
        self, ids: Array, before: Sequence[KeysValues], at: Array | None
    ) -> tuple[Array, list[KeysValues]]:
        """The last layer's result, at one position or all, and every layer's keys and values."""
        hidden = self.embedded(ids)
        kept: list[KeysValues] = []
        offset = before[0][0].shape[2] if before else 0
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            place = at if number == last else None
            mask = self._mask(ids.shape[1], offset, layer["window"], place)
            past = before[number] if before else None
            hidden, new = self.layer(hidden, number, mask, past, place)
            kept.append(new)
        return hidden, kept

    def _mask(self, length: int, offset: int, window: int | None, at: Array | None) -> Array | str:
        """What tokens see; see `Graph.layer`.

        Args:
            length: tokens after the prefix.
            offset: tokens of the prefix.
            window: number of tokens that a token sees, itself included; None: all before it.
            at: the only positions that see; None: all.
        """
        mx, whole = self._mx, offset + length
        if at is None and (window is None or whole <= window):
            return "causal"
        others = mx.arange(whole)
        places = offset + (mx.arange(length)[None, :, None] if at is None else at[:, None, None])
        seen = others <= places
        if window is not None:
            seen = seen & (others > places - window)
        return seen[:, None]
