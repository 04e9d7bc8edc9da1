"""What only SENet-154 has (Hu et al. 2018), in a small network: no dead parameter, and the scale of its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from research.models.convolution import Convolution
from research.models.resnet import ResNet, Stage


def test_every_parameter_of_a_small_senet_has_a_gradient(abstract_variables, lively):
    """Deep stem, pooling, groups, 3x3 projections, excitation and dropout before the classifier together."""

    def stage(width, stride):
        return Stage(2, (Convolution(4, 1), Convolution(4, 3, stride, groups=2), Convolution(width, 1)))

    model = ResNet(
        stem=(Convolution(4, 3, 2), Convolution(4), Convolution(6)),
        pool=True,
        stages=(stage(6, 1), stage(8, 2)),
        num_classes=5,
        option="B",
        projection_kernel=3,
        squeeze_ratio=2,
        head_dropout=0.2,
    )
    variables = lively(abstract_variables(model, size=16))
    assert variables["params"]["stage2_first"]["projection"]["kernel"].shape == (3, 3, 6, 8)
    assert "projection" not in variables["params"]["stage1_first"]
    images = np.random.default_rng(2).standard_normal((8, 16, 16, 3))

    def loss(params, key):
        collections = {**variables, "params": params}
        logits, _ = model.apply(collections, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
        return jnp.sin(logits).sum(), logits

    with jax.enable_x64(True):
        step = jax.jit(jax.grad(loss, has_aux=True))
        (gradients, logits), (_, others) = (step(variables["params"], jax.random.key(seed)) for seed in (0, 1))
    for path, gradient in flatten_dict(jax.device_get(gradients), sep="/").items():
        assert (np.abs(gradient) > 1e-9).mean() > (0.3 if "squeeze" in path else 0.9), path
    assert np.abs(np.asarray(logits) - np.asarray(others)).max() > 0.01  # another key drops other features


def test_dropout_before_the_classifier_drops_features_and_rescales_the_others(abstract_variables, lively):
    """Unlike dropout on a shortcut: the classifier reads features of the same mean in training and evaluation."""
    stage = Stage(1, (Convolution(8),))
    model = ResNet((Convolution(8),), False, (stage,), num_classes=8, head_dropout=0.2)
    images = np.random.default_rng(3).standard_normal((64, 8, 8, 3)).astype(np.float32)
    variables = jax.tree.map(np.float32, lively(abstract_variables(model, size=8)))
    variables["params"]["head"] = {"kernel": np.eye(8, dtype=np.float32), "bias": np.zeros(8, np.float32)}

    def features(model, **options):
        return np.asarray(model.apply(variables, images, train=True, mutable=["batch_stats"], **options)[0])

    kept = features(model.clone(head_dropout=0.0))
    dropped = features(model, rngs={"dropout": jax.random.key(0)})
    mask = dropped != 0
    np.testing.assert_allclose(dropped, np.where(mask, kept / 0.8, 0), rtol=1e-5)
    assert abs(mask.mean() - 0.8) < 5 * 0.4 / np.sqrt(mask.size)
    evaluated = [np.asarray(m.apply(variables, images, train=False)) for m in (model, model.clone(head_dropout=0.0))]
    np.testing.assert_array_equal(*evaluated)
