"""Process groups, parameter sharding, and what the ranks of a step agree on."""
