"""A frozen base of which each rank of a machine holds a part.

Whether a run shards is the plan's to say (``fast/shard_choice.py``).
"""
