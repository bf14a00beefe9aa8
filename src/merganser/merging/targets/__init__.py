"""What a plan is carried out into: a full checkpoint, or a LoRA adapter. A ledger has its own, beside its sums."""
