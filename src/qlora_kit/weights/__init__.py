"""Reading and merging checkpoint tensors one at a time.

Nothing here knows what format the tensors will be written in.
"""
