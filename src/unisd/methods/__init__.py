"""The methods: pure functions of tensors, each a page.

Importing this package registers the published ones.
"""

from unisd.methods import agreement, targets, terms, weights

__all__ = ["agreement", "targets", "terms", "weights"]
