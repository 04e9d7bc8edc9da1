"""How sequence networks are trained: defaults sized for minutes on two cores, and the papers' settings.

A recipe is a table: task -> fields of `experiments.sequences.Recipe` that differ from its defaults. `cells` holds, per
kind of cell, fields that differ again, such as its units.
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


def _bai(lstm: tuple[int, ...], gru: tuple[int, ...], tanh: tuple[int, ...], **fields: Any) -> dict[str, Any]:
    return {"cells": {"lstm": {"units": lstm}, "gru": {"units": gru}, "tanh": {"units": tanh}}} | fields


_BAI_PIXELS = {
    "lstm": (130,),
    "gru": (151,),
    "tanh": (258,),
    "optimizer": "rmsprop",
    "learning_rate": 1e-3,
    "clip_norm": 1.0,
    "batch_size": 64,
    "epochs": 20,
}


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


def _small(**fields: Any) -> dict[str, Any]:
    # The identity in the recurrence amplifies what an update changes at every step: it takes smaller ones.
    both = {"units": (32,), "batch_size": 32, "steps": 1_500, "learning_rate": 5e-3}
    return both | {"cells": {"irnn": {"learning_rate": 2e-3}}} | fields


RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {
        "adding": _small(learning_rate=1e-2),
        "copy": _small(),
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
        "nottingham": _CHUNG | {"batch_size": 2, "epochs": 100},
        "muse": _CHUNG | {"batch_size": 1, "epochs": 100},
        "piano": _CHUNG | {"batch_size": 1, "epochs": 300},
    },
    # Units of the LSTM are the paper's; those of the others give as many parameters as its table says.
    "bai2018": {
        "adding": _bai((130,), (150,), (262,), batch_size=32, clip_norm=5.0, epochs=10),
        "copy": _bai((50,), (61,), (116,), batch_size=32, optimizer="rmsprop", learning_rate=5e-4, epochs=10),
        "mnist": _bai(**_BAI_PIXELS),
        "permuted_mnist": _bai(**_BAI_PIXELS, forget_bias=10.0),
        "jsb": _bai((200, 200), (235, 235), (435, 435), batch_size=8, select="best", epochs=100),
        "nottingham": _bai((280,) * 3, (324,) * 3, (600,) * 3, batch_size=8, learning_rate=4e-3, select="best"),
        "words": _bai((700,) * 2, (750,) * 2, (950,) * 2, batch_size=16, time=80, dropout=0.5, select="best"),
        "characters": _bai((500,) * 2, (570,) * 2, (900,) * 2, batch_size=32, time=400, select="best"),
    },
    "zaremba2014_small": _zaremba(200, time=20, clip=5.0, init_scale=0.1, epochs=13, hold_epochs=4, decay=2.0),
    "zaremba2014_medium": _zaremba(
        650, time=35, clip=5.0, init_scale=0.05, dropout=0.5, epochs=39, hold_epochs=6, decay=1.2
    ),
    "zaremba2014_large": _zaremba(
        1500, time=35, clip=10.0, init_scale=0.04, dropout=0.65, epochs=55, hold_epochs=14, decay=1.15
    ),
}
