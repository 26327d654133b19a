"""The reference in torch."""

from spikellm.kernels.torch.backend import TorchBackend

__all__ = ["TorchBackend"]
