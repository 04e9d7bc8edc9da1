"""The encoding-forecasting network of Shi et al. 2015: ConvLSTM, ConvGRU and FC-LSTM.

One stack reads the frames that are known; its last states are where a second stack begins, which reads nothing and
runs for as many steps as frames are asked for. That stack's layers stand in reverse order: the encoder's top layer, of
the most abstract state, is the forecaster's bottom one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.models.head import head
from research.models.recurrent import Cell, Recurrent
from research.ops import patches


class EncoderForecaster(nn.Module):
    """Frames to come from frames that were, as logits of grey values in [0, 1].

        encoder      H^k = recurrent_k(H^{k-1}) from zero states, H^0 the frames, k = 1 ... K
        forecaster   G^k from the last state of H^k, k = K ... 1; G^K reads nothing, G^k reads G^{k+1}
        prediction   1x1 convolution of all G^k beside each other; for vectors a linear layer on G^1, the top

    The paper leaves parts of this open; its six networks' parameter counts, which tests meet exactly, close them.

    Attributes:
      cell: of every layer; in the paper an LSTM with peepholes.
      features: channels (units) of the encoder's layers, bottom first.
      horizon: frames to predict.
      kernels: input-to-state and state-to-state kernel sizes of every layer; None for FC-LSTM, which reads each frame
        as one vector.
      patch: frames are folded by it, see `research.ops.patches.fold`.
      segment: see `research.ops.recurrence.recur`.
      dtype: of the recurrent layers, see `Recurrent`; logits are float32.

    Source: Shi et al. 2015, "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting",
    section 3.2 and Figure 3; FC-LSTM: Srivastava et al. 2015.
    """

    cell: Cell
    features: tuple[int, ...]
    horizon: int
    kernels: tuple[int, int] | None = None
    patch: int = 1
    segment: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits `[batch, horizon, height, width, channels]` of x `[batch, time, height, width, channels]`."""
        folded = patches.fold(x, self.patch)
        y = folded if self.kernels else folded.reshape(*x.shape[:2], -1)
        outputs, carries = y.shape[-1], []
        for number, n in enumerate(self.features, start=1):
            carry, y = self._layer(f"encoder{number}", n)(y)
            carries.append(carry)
        y, states = None, []
        for number, n in reversed(list(enumerate(self.features, start=1))):
            _, y = self._layer(f"forecaster{number}", n)(y, carries[number - 1], time=self.horizon)
            states.append(y)
        y = jnp.concatenate(states, axis=-1) if self.kernels else y
        y = head(outputs, self.dtype, name="prediction")(y)  # on a map this is the 1x1 convolution
        return patches.unfold(y.reshape(x.shape[0], self.horizon, *folded.shape[2:]), self.patch)

    def _layer(self, name, features):
        options = {"kernels": self.kernels, "segment": self.segment, "dtype": self.dtype}
        return Recurrent(self.cell, features, **options, name=name)
