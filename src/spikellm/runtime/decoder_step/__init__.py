"""A decoder step that never returns to Python: all blocks in one native call, checked against the
library's forward pass before it is relied on.
"""
