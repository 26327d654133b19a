"""Sources of the native kernels, in C11; compiled on first use by :mod:`spikellm.kernels.native.build`."""
