"""Which channels get the steps: perplexity over criteria, thresholds, and scores before or after
smoothing.

    python benchmarks/saliency.py MODEL CALIBRATION TEST [--recipe spike-w4a4-t2] [--seeds 2,3,4]
    [--samples 16] [--limit 40] [--json FILE]

Each cell converts with the recipe's SmoothQuant start alone (no epochs, no clipping), so that the
choice of channels is what differs. Prints mean and standard deviation over the seeds, and each
seed, as ratios to the original model.
"""

from __future__ import annotations

from variants import measure, parse

START = ["algorithm.epochs=0", "algorithm.lwc=false"]
CRITERIA = ("first-order", "expected-error", "rms", "layer-loss")


def variants() -> dict[str, list[str]]:
    """Settings by name of the variant."""
    found: dict[str, list[str]] = {"no salient channels": ["activations={bits: 4}"]}
    for criterion in CRITERIA:
        for thresholds in ("shared", "split"):
            for after in (False, True):
                settings = [
                    f"activations.saliency={criterion}",
                    f"activations.thresholds={thresholds}",
                    f"algorithm.saliency_after_smoothing={str(after).lower()}",
                ]
                found[f"{criterion}, {thresholds}, {'after' if after else 'before'}"] = settings
    found["layer-loss, split, after; each layer for itself"] = ["activations.salient_for=layer"]
    return {name: START + settings for name, settings in found.items()}


if __name__ == "__main__":
    measure(parse(__doc__ or "", "spike-w4a4-t2", 16, 40), variants())
