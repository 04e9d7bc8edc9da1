"""How sequence networks are trained: defaults sized for minutes on two cores, and the papers' settings.

A recipe is a table: task -> fields of `experiments.sequences.SequenceCell` that differ from its defaults. `cells`
holds, per kind of cell, fields that differ again, such as its units; `lengths` the T that a task is learned at.
"""

from typing import Any

# The size of each cell so that networks of a task have about as many parameters: Chung et al. 2014, music (19,764,
# 20,217 and 20,050 recurrent weights at their mean of 100.5 notes).
_CHUNG = {
    "cells": {"lstm_peepholes": {"units": (36,)}, "gru_before": {"units": (46,)}, "tanh": {"units": (100,)}},
    "use_bias": False,
    "optimizer": "rmsprop",
    "learning_rate": 1e-3,
    "clip_norm": 1.0,
    "weight_noise": 0.075,
    "forget_bias": 0.0,
    "select": "best",
}
# The rate at which each cell's validation loss fell fastest; the paper draws ten rates a cell.
_NOTTINGHAM = _CHUNG | {
    "learning_rate": 1e-2,
    "cells": _CHUNG["cells"] | {"tanh": {"units": (100,), "learning_rate": 1e-3}},
}


def _bai(lstm: tuple[int, ...], gru: tuple[int, ...], tanh: tuple[int, ...], **fields: Any) -> dict[str, Any]:
    return {"cells": {"lstm": {"units": lstm}, "gru": {"units": gru}, "tanh": {"units": tanh}}} | fields


_BAI_PIXELS = {
    "lstm": (130,),
    "gru": (150,),
    "tanh": (259,),
    "optimizer": "rmsprop",
    "learning_rate": 1e-3,
    "clip_norm": 1.0,
    "batch_size": 64,
    "epochs": 20,
}
_BAI_COPY = {"optimizer": "rmsprop", "learning_rate": 5e-4, "epochs": 10}
_BAI_100 = {"epochs": 100, "select": "best"}


def _zaremba(units: int, **fields: Any) -> dict[str, Any]:
    # The paper's loss is summed over the steps of a window and averaged over streams; ours is the mean over both. A
    # rate of `time` and a threshold divided by `time` make the same updates.
    time = fields["time"]
    both = {
        "units": (units, units),
        "optimizer": "sgd",
        "learning_rate": 1.0 * time,
        "clip_norm": fields.pop("clip") / time,
    }
    return {"words": both | {"forget_bias": 0.0, "batch_size": 20, "select": "best"} | fields}


def _small(rate: float = 5e-3, tanh: float = 5e-3, irnn: float = 2e-3, **fields: Any) -> dict[str, Any]:
    # The rate at which each cell does best here. The identity in the recurrence amplifies what an update changes at
    # every step: it takes smaller ones.
    both = {"units": (32,), "batch_size": 32, "steps": 1_500, "learning_rate": rate}
    return both | {"cells": {"tanh": {"learning_rate": tanh}, "irnn": {"learning_rate": irnn}}} | fields


RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {
        "adding": _small(rate=1e-2, tanh=3e-3, irnn=1e-3, lengths=(25, 50, 100)),
        "copy": _small(lengths=(25, 50, 100)),
        "digits": _small(),
        "permuted_digits": _small(),
        "mnist": _small(batch_size=128),
        "permuted_mnist": _small(batch_size=128),
        "jsb": {"units": (64,), "batch_size": 8, "epochs": 50, "select": "best"},
        "nottingham": {"units": (64,), "batch_size": 8, "epochs": 20, "select": "best"},
        "muse": {"units": (64,), "batch_size": 8, "epochs": 10, "select": "best"},
        "piano": {"units": (64,), "batch_size": 8, "epochs": 20, "select": "best"},
        "words": {"units": (200,), "batch_size": 20, "time": 35, "epochs": 5, "select": "best"},
        "characters": {"units": (128,), "batch_size": 32, "time": 64, "epochs": 2, "select": "best"},
    },
    "chung2014": {
        "jsb": _CHUNG | {"batch_size": 8, "epochs": 600},
        "nottingham": _NOTTINGHAM | {"batch_size": 2, "epochs": 100},
        "muse": _CHUNG | {"batch_size": 1, "epochs": 100},
        "piano": _CHUNG | {"batch_size": 1, "epochs": 300},
    },
    # Units of the LSTM are the paper's, but for text, where they give the size in its table (13M and 3M parameters);
    # GRU and tanh have as many parameters as the LSTM. Epochs are those of the authors' published code.
    "bai2018": {
        "adding": _bai((130,), (150,), (261,), lengths=(600,), batch_size=32, clip_norm=5.0, epochs=10),
        "copy": _bai((50,), (58,), (103,), lengths=(1000,), batch_size=32, **_BAI_COPY),
        "mnist": _bai(**_BAI_PIXELS),
        "permuted_mnist": _bai(**_BAI_PIXELS, forget_bias=10.0),
        "jsb": _bai((200,) * 2, (232,) * 2, (407,) * 2, batch_size=8, **_BAI_100),
        "nottingham": _bai((280,) * 3, (324,) * 3, (565,) * 3, batch_size=8, learning_rate=4e-3, **_BAI_100),
        "words": _bai((470,) * 2, (498,) * 2, (580,) * 2, batch_size=16, time=80, dropout=0.5, **_BAI_100),
        "characters": _bai((430,) * 2, (496,) * 2, (854,) * 2, batch_size=32, time=400, **_BAI_100),
    },
    "zaremba2014_small": _zaremba(200, time=20, clip=5.0, init_scale=0.1, epochs=13, hold_epochs=4, decay=2.0),
    "zaremba2014_medium": _zaremba(
        650, time=35, clip=5.0, init_scale=0.05, dropout=0.5, epochs=39, hold_epochs=6, decay=1.2
    ),
    "zaremba2014_large": _zaremba(
        1500, time=35, clip=10.0, init_scale=0.04, dropout=0.65, epochs=55, hold_epochs=14, decay=1.15
    ),
}
