"""What experiments share that train a network: the plan from a cell, and what every result.json holds."""

from typing import Any


def evaluate_every(steps: int, evaluations: int, stretch: int) -> int:
    """Steps between evaluations that are evenly spread, in whole stretches."""
    return max(1, round(steps / evaluations / stretch)) * stretch


def plan_of(cell: Any, splits: Any, **further: Any) -> Any:
    """The plan of a cell with `steps` or `epochs`; of epochs as many whole stretches as they hold.

    Args:
      cell: has `seed`, `steps`, `epochs`, `batch_size`, `steps_per_call`, `evaluations`, `parallel`, `devices`.
      splits: the data set, `research.training.loop.Splits`.
      **further: fields of `research.training.loop.Plan`.
    """
    from research.training import loop

    steps = cell.steps or max(1, cell.epochs * splits.train // cell.batch_size)
    stretch = min(cell.steps_per_call, steps)
    steps = steps if cell.steps else max(1, steps // stretch) * stretch  # another length is another program
    return loop.Plan(
        seed=cell.seed,
        steps=steps,
        batch_size=cell.batch_size,
        steps_per_call=stretch,
        evaluate_every=evaluate_every(steps, cell.evaluations, stretch),
        train_evaluation_examples=min(splits.train, splits.validation),
        parallel=cell.parallel,
        devices=cell.devices,
        **further,
    )


def result_of(outcome: Any, plan: Any) -> dict[str, Any]:
    """Final evaluations, size (of one seed's network), steps, times, and the digest of the final state."""
    import jax
    import numpy as np

    return {
        **{f"{split}_{metric}": v for split, metrics in outcome.evaluations.items() for metric, v in metrics.items()},
        "params": sum(leaf.size for leaf in jax.tree.leaves(outcome.final.params)) // np.size(plan.seed),
        "steps": plan.steps,
        "seconds": outcome.seconds,
        "examples_per_second": outcome.examples_per_second,
        "final_state_sha256": outcome.sha256,
    }
