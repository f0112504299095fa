"""Blocks of other nodes of the cluster: what they hold, how it comes, and how this node lends."""
