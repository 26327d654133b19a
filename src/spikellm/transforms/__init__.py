"""Transforms that leave a full-precision model's function as it is, or weights within their range,
and make it easier to code.
"""
