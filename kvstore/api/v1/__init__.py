"""Generated from `proto/kvstore/v1`; run `make proto` to write it again."""
