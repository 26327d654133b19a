"""Which weight columns get the steps: perplexity of ternary weights at the same average of steps.

    python benchmarks/steps.py MODEL CALIBRATION TEST [--recipe ternary-1.4] [--seeds 2,3,4]
    [--samples 64] [--limit N] [--json FILE]

40% of the columns at two steps and 20% at three, by several rankings and their controls, and
budgets of 1.4 over each layer and over the model. Prints mean and standard deviation over the
seeds, and each seed, as ratios to the original model.
"""

from __future__ import annotations

from variants import measure, parse


def variants() -> dict[str, list[str]]:
    """Settings by name of the variant."""
    fixed = {
        "second-order": "saliency: second-order",
        "magnitude": "saliency: magnitude",
        "random": "saliency: random",
        "second-order, inverted": "saliency: second-order, invert: true",
    }
    found = {}
    for rate, steps in ((0.4, 2), (0.2, 3)):
        for name, choice in fixed.items():
            weights = (
                f"weights={{format: ternary, salient_rate: {rate},"
                f" salient_steps: {steps}, {choice}}}"
            )
            found[f"{rate:.0%} at T = {steps}: {name}"] = [weights]
    for scope in ("layer", "model"):
        found[f"budget over the {scope}"] = [f"weights.allocation={scope}"]
    return found


if __name__ == "__main__":
    measure(parse(__doc__ or "", "ternary-1.4", 64, None), variants())
