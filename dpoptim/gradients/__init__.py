"""From autograd to mean gradients. Nothing here knows an optimizer."""

from dpoptim.gradients.bucket import Bucket

__all__ = ["Bucket"]
