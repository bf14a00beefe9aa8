"""Parts of the verb ``collect``: its examples, the shards they are cut into, and where these run."""
