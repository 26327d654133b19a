"""Integer codes: rounding, packing, affine weights, thresholds of activations."""
