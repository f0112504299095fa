"""Everything that keeps blocks, one kind in each file; all are `kvstore.api.tier.Tier`."""
