"""What the papers printed, for 'paper | here' tables: (recipe, task, length) -> cell -> score."""

from collections.abc import Mapping

Scores = Mapping[str, float]

# Chung et al. 2014, Table 2: negative log-likelihood, nats a frame, test.
_CHUNG = {
    "nottingham": {"tanh": 3.13, "gru_before": 3.23, "lstm_peepholes": 3.20},
    "jsb": {"tanh": 9.10, "gru_before": 8.54, "lstm_peepholes": 8.67},
    "muse": {"tanh": 6.23, "gru_before": 5.99, "lstm_peepholes": 6.23},
    "piano": {"tanh": 9.03, "gru_before": 8.82, "lstm_peepholes": 9.03},
}

# Bai et al. 2018, Table 1: mean squared error, cross-entropy, error rate (100% - accuracy), NLL, perplexity, bits.
_BAI = {
    ("adding", 600): {"lstm": 0.164, "gru": 5.3e-5, "tanh": 0.177},
    ("copy", 1000): {"lstm": 0.0204, "gru": 0.0197, "tanh": 0.0202},
    ("mnist", None): {"lstm": 0.128, "gru": 0.038, "tanh": 0.785},
    ("permuted_mnist", None): {"lstm": 0.143, "gru": 0.127, "tanh": 0.747},
    ("jsb", None): {"lstm": 8.45, "gru": 8.43, "tanh": 8.91},
    ("nottingham", None): {"lstm": 3.29, "gru": 3.46, "tanh": 4.05},
    ("words", None): {"lstm": 78.93, "gru": 92.48, "tanh": 114.50},
    ("characters", None): {"lstm": 1.36, "gru": 1.37, "tanh": 1.48},
}

# Zaremba et al. 2014, Table 1, perplexity; the small network's is that of the authors' published code.
_ZAREMBA = {"zaremba2014_small": 114.5, "zaremba2014_medium": 82.7, "zaremba2014_large": 78.4}

PAPER: dict[tuple[str, str, int | None], Scores] = {
    **{("chung2014", task, None): scores for task, scores in _CHUNG.items()},
    **{("bai2018", task, length): scores for (task, length), scores in _BAI.items()},
    **{(recipe, "words", None): {"lstm": score} for recipe, score in _ZAREMBA.items()},
}

DIFFERENCES = {
    "chung2014": (
        "88 notes (the paper's files had 93 to 108); whole sequences packed in rows, batches of 1 to 8 rows; one "
        "learning rate is given, the paper draws ten and keeps the best; batch size, length of training and "
        "initialisation are not in the paper; biases only at the output"
    ),
    "bai2018": (
        "constant rates, no annealing; GRU and tanh have as many parameters as the LSTM, which on music with the "
        "paper's units are more than its table says (JSB Chorales 570K for 300K, Nottingham 1.7M for 1M), and on copy "
        "memory fewer (13K for 16K); batches of 8 packed rows for music (the paper: one sequence); adding and copy "
        "from 50,000 fixed sequences; layers, units and windows of the Penn Treebank are ours"
    ),
    "zaremba2014": (
        "one bias vector a layer (the authors' two), the last windows of a text are padded, validation and test are "
        "read as 20 streams (the paper: one)"
    ),
}
