"""Shards to codes and codes back to rows, with the bundle that belongs to them. One codes shard per shard."""
