"""The lecture as a ladder: from a uniform guess to the transformer, one small change at a time."""
