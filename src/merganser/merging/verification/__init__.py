"""Checking a merged folder against its provenance, from its files to tensors that are merged again."""

from merganser.merging.verification.verify import Verification, reproduce, verify

__all__ = ["Verification", "reproduce", "verify"]
