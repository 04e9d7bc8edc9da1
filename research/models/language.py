"""Language models over windows of a text: recurrent, and the feed-forward n-gram network.

Both are called as `model(tokens, first, *, train)`: tokens `[batch, time]`, first `[batch]`, True where a text begins;
they put out logits `[batch, time, vocabulary]` of the token that comes next. What a window has to know of those before
it stands in the collection `carry`, so that a text in windows is read as if it were in one piece.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.flatten_util import ravel_pytree

from research.models.head import head
from research.models.recurrent import Cell, Recurrent
from research.ops.dropout import keep_mask


class Carried(nn.Module):
    """What goes from window to window, for all streams of text and equal on every device: the collection `carry`.

    Initialisation reads a batch of any size and leaves the state as `initial` gives it.

    Attributes:
      initial: `streams -> state` before a text begins, arrays `[streams, n]`.
      streams: texts side by side, over all devices.
      axis_name: mapped axis over which the batch is split, in order; None where the batch is whole.
    """

    initial: Callable[[int], Any]
    streams: int
    axis_name: str | None = None

    def setup(self):
        self.state = self.variable("carry", "state", self.initial, self.streams)

    def before(self, first: jax.Array) -> Any:
        """The state before the window, of this device's share of the streams; no gradient flows into it.

        Args:
          first: `[batch]` bool, True where the text begins and nothing is carried.

        Raises:
          ValueError: the batch is not this device's share of the streams.
        """
        batch = first.shape[0]
        if self.is_initializing():
            return self.initial(batch)
        devices = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        streams = jax.tree.leaves(self.state.value)[0].shape[0]
        if batch * devices != streams:
            raise ValueError(
                f"a batch of {batch} on each of {devices} devices does not continue {streams} streams of text: "
                "make the batch size the number of streams"
            )
        place = 0 if self.axis_name is None else lax.axis_index(self.axis_name) * batch

        def share(carried, start):
            carried = lax.stop_gradient(lax.dynamic_slice_in_dim(carried, place, batch))
            return jnp.where(first[:, None], start, carried)

        return jax.tree.map(share, self.state.value, self.initial(batch))

    def keep(self, state: Any) -> None:
        """Carries `state`, of this device's share of the streams, to the next window."""
        if self.is_initializing():
            return
        if self.axis_name is not None:
            state = jax.tree.map(lambda leaf: lax.all_gather(leaf, self.axis_name, tiled=True), state)
        self.state.value = state


class RecurrentLanguageModel(nn.Module):
    """A stack of recurrent layers between an embedding and a linear layer, without dropout in the recurrence.

        h^0_t = E[w_t]    h^l_t = cell(D(h^{l-1}_t), h^l_{t-1})    logits_t = V D(h^L_t) + c
        D(h) = m h / (1 - p), m ~ Bernoulli(1 - p) for every element and step; in evaluation D(h) = h

    With a tanh or sigmoid cell and p = 0 it is the plain recurrent model, h_t = act(W e_t + U h_{t-1} + b).

    Attributes:
      vocabulary: number of tokens.
      embedding: of them, numbers a token.
      cell: see `research.models.recurrent.Cell`.
      features: units of each layer.
      streams: texts side by side, over all devices; the batch is of them.
      dropout: p.
      init_scale: s, to draw every parameter from U(-s, s) (the paper: 0.1, 0.05 and 0.04); None for E ~ N(0, 1 /
        embedding), LeCun's normal V, c = 0 and the cell's own.
      axis_name: mapped axis over which the batch is split.
      dtype: of the recurrent layers, see `Recurrent`; the embedding, the state carried on and the logits are float32.

    Source: Zaremba et al. 2014, "Recurrent Neural Network Regularization", sections 3.1 and 4.1. The forget gate's
    extra bias, 0 in the paper's code, is the cell's.
    """

    vocabulary: int
    embedding: int
    cell: Cell
    features: tuple[int, ...]
    streams: int
    dropout: float = 0.0
    init_scale: float | None = None
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array, first: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[batch, time, vocabulary]` of the token after each of `tokens` `[batch, time]`."""
        chex.assert_rank([tokens, first], [2, 1])
        carried = Carried(self._initial, self.streams, self.axis_name, name="text")
        x, last = nn.Embed(self.vocabulary, self.embedding, name="embedding")(tokens), []
        for number, (n, carry) in enumerate(zip(self.features, carried.before(first), strict=True), start=1):
            carry, x = Recurrent(self.cell, n, dtype=self.dtype, name=f"layer{number}")(self._drop(x, train), carry)
            last.append(carry)
        carried.keep(tuple(last))
        logits = head(self.vocabulary, self.dtype, name="head")(self._drop(x, train))
        if self.init_scale is not None and self.is_initializing():
            self._draw_uniform()
        return logits

    def _initial(self, streams):
        return tuple(self.cell.initial(streams, n) for n in self.features)

    def _drop(self, x, train):
        if not train or self.dropout == 0 or self.is_initializing():
            return x
        keep = keep_mask(self.make_rng("dropout"), x.shape, rate=self.dropout, axis_name=self.axis_name)
        return jnp.where(keep, x / (1 - self.dropout), 0)

    def _draw_uniform(self):
        flat, unravel = ravel_pytree(self.variables["params"])
        scale, key = self.init_scale, self.make_rng("params")
        drawn = unravel(jax.random.uniform(key, flat.shape, flat.dtype, minval=-scale, maxval=scale))
        for name, value in drawn.items():
            self.put_variable("params", name, value)


class FeedForwardLanguageModel(nn.Module):
    """The n-gram network of n = context + 1: one hidden layer over the embeddings of the newest tokens.

        h_t = act(W [e_t; e_{t-1}; ...; e_{t-context+1}] + b)        logits_t = V h_t + c        e_t = E[w_t]

    Before a text begins e is zero. Differences from Bengio et al. 2003, "A Neural Probabilistic Language Model",
    equation 1: sigmoid in place of tanh, and no connections from the embeddings to the logits. The deck's slide prints
    the window e_{t-1}, e_{t-2}, e_{t-3} beside the prediction of w_{t+1}, which leaves out the newest word; here it is
    read, as in the paper. E ~ N(0, 1 / embedding), W and V LeCun's normal, biases zero.

    Attributes:
      vocabulary: number of tokens.
      embedding: of them, numbers a token.
      hidden: units.
      streams: texts side by side, over all devices; the batch is of them.
      context: tokens that are read, at least 1.
      activation: act.
      axis_name: mapped axis over which the batch is split.
      dtype: of the hidden layer and the operands of products; None for float32, which embedding and logits always are.
    """

    vocabulary: int
    embedding: int
    hidden: int
    streams: int
    context: int = 3
    activation: Callable[[jax.Array], jax.Array] = nn.sigmoid
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array, first: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[batch, time, vocabulary]` of the token after each of `tokens` `[batch, time]`."""
        chex.assert_rank([tokens, first], [2, 1])
        if self.context < 1:
            raise ValueError(f"context {self.context}: the network reads at least one token")
        time = tokens.shape[1]
        carried = Carried(self._initial, self.streams, self.axis_name, name="text")
        tokens = jnp.concatenate([carried.before(first), tokens], axis=1)
        carried.keep(tokens[:, time:])
        embedded = nn.Embed(self.vocabulary, self.embedding, name="embedding")(jnp.maximum(tokens, 0))
        embedded = jnp.where(tokens[..., None] < 0, 0, embedded)
        newest_first = [embedded[:, place : place + time] for place in reversed(range(self.context))]
        layer = nn.Dense(self.hidden, dtype=self.dtype, name="hidden")
        h = self.activation(layer(jnp.concatenate(newest_first, axis=-1)))
        return head(self.vocabulary, self.dtype, name="head")(h)

    def _initial(self, streams):
        return jnp.full((streams, self.context - 1), -1, jnp.int32)
