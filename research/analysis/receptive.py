"""From where on the map a recurrent network's state has come: derivatives of one state by all earlier inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.models.forecaster import EncoderForecaster
from research.models.recurrent import Recurrent


def of_encoder(network: EncoderForecaster, params: Any, *, time: int, size: int, seed: int = 0) -> np.ndarray:
    """How much one state of the top encoder layer depends on every pixel of the map, d = 0, 1, ... steps before.

        m_d[i, j] = | d sum_c H_T[centre, c] / d x_{T-d}[i, j] |        the norm over the input's channels

    The inputs are noise, U[0, 1), since which pixels matter at all does not depend on them.

    Args:
      network: on maps; its weights do not depend on the size of the map, so any will do.
      params: of the network.
      time: steps; d = 0 ... time - 1.
      size: height and width of the map, in pixels after folding, odd.
      seed: of the noise.

    Returns:
      `[time, size, size]`.

    Raises:
      ValueError: the network reads vectors, or has peepholes by position, which fit one size only.

    Source: Shi et al. 2015, section 3.1.
    """
    if network.kernels is None or network.cell.own_by_position:
        raise ValueError("only weights that all positions share have a receptive field on a map of any size")
    channels = params["encoder1"]["input_kernel"].shape[2]

    def state(x):
        y = x
        for number, features in enumerate(network.features, start=1):
            layer = Recurrent(network.cell, features, kernels=network.kernels)
            _, y = layer.apply({"params": params[f"encoder{number}"]}, y)
        return y[0, -1, size // 2, size // 2].sum()

    noise = jax.random.uniform(jax.random.key(seed), (1, time, size, size, channels))
    return np.asarray(jnp.linalg.norm(jax.jit(jax.grad(state))(noise)[0, ::-1], axis=-1))


def diameters(maps: np.ndarray) -> list[int]:
    """Side of the square around the centre that holds all that is not zero, of each map `[steps, size, size]`."""
    found = []
    for each in maps:
        places = np.argwhere(each != 0) - each.shape[0] // 2
        found.append(int(2 * np.abs(places).max() + 1) if len(places) else 0)
    return found
