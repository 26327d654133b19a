"""Changes to a model, made before it is coded, that leave its function in full precision as it is:
rotations and scales that make what is coded even.
"""

from spikellm.core.registry import import_parts
from spikellm.transforms.base import ModelState, Transform, transforms, transforms_of

__all__ = ["ModelState", "Transform", "transforms", "transforms_of"]

import_parts(__name__, __path__)
